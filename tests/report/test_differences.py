"""Which differences are planned, how they are paired and corrected, and what is said of them."""

import numpy as np
import pytest
from scipy import stats
from small_results import compared, results_of, row

from pipeline.report.answers import summary
from pipeline.report.columns import Metric
from pipeline.report.metrics import METRICS
from pipeline.report.results import Difference, Results
from pipeline.report.statistics import holm, paired
from pipeline.study.arms import ARMS

Values = dict[str, list[float | None]]


def study(
    k1: Values, fvu: Values | None = None, l0: Values | None = None, bases: dict[str, str | None] | None = None
) -> Results:
    """A study of the arms of `k1`, one value for each seed."""
    rows = [
        row(
            arm,
            seed,
            fvu=0.1 if fvu is None else fvu[arm][seed],
            l0=20.0 if l0 is None else l0[arm][seed],
            sparse_probing=None if value is None else {"1": value, "all": 0.9},
            sparse_probing_by_task=None
            if value is None
            else {"easy": {"1": value + 0.1, "all": 0.9}, "hard": {"1": 0.5, "all": 0.9}},
        )
        for arm, values in k1.items()
        for seed, value in enumerate(values)
    ]
    return results_of(rows, bases=bases, tasks=("easy", "hard"))


def differences(*values: Values, bases: dict[str, str | None] | None = None) -> tuple[Difference, ...]:
    return study(*values, bases=bases).differences


def entry(found: tuple[Difference, ...], arm: str, reference: str = "full", metric: str = "sparse_probing_1") -> Difference:
    (one,) = [entry for entry in found if (entry.arm, entry.reference, entry.metric) == (arm, reference, metric)]
    return one


def test_seeds_are_paired_and_a_missing_one_is_left_out_of_both() -> None:
    found = differences({"full": [0.70, 0.72, 0.90, 0.74], "no-contrast": [0.71, 0.74, None, 0.73]})
    one = entry(found, "no-contrast")
    assert one.seeds == 3
    assert one.difference == pytest.approx((0.01 + 0.02 - 0.01) / 3)
    mirrored = entry(found, "full", "no-contrast")
    assert mirrored.difference == -one.difference
    assert not mirrored.planned
    assert mirrored.verdict is None


def test_planned_is_every_arm_against_the_arm_it_changes() -> None:
    values: Values = {
        arm: [0.7, 0.71, 0.72] for arm in ("baseline", "full", "no-contrast", "magnitude", "strong", "stronger")
    }
    found = differences(values, bases={"strong": "full", "stronger": "strong"})
    planned = {(one.arm, one.reference) for one in found if one.planned}
    assert planned == {
        ("baseline", "full"), ("no-contrast", "full"), ("magnitude", "full"), ("strong", "full"), ("stronger", "strong")
    }  # fmt: skip
    assert {one.metric for one in found if one.planned} == {"sparse_probing_1", "fvu"}
    references = {one.reference for one in found}
    assert references == {"full", "no-contrast", "baseline", "strong"}


def test_no_arm_is_ranked_by_the_pair_capture_rate() -> None:
    metrics = [metric for metric in METRICS if isinstance(metric, Metric) and "bpcr" in metric.path]
    assert len(metrics) > 10
    assert not [metric for metric in metrics if metric.planned or metric.better]


def test_what_is_measured_on_the_pairs_of_the_baseline_is_not_planned() -> None:
    """They are the baseline's: even a baseline with the same start and another order of batches interferes less on them."""
    planned = {metric.path for metric in METRICS if isinstance(metric, Metric) and metric.planned}
    assert ("interference", "own", "interference") in planned
    assert not [path for path in planned if "fixed" in path]


def test_p_values_are_corrected_for_the_whole_page() -> None:
    k1: Values = {"full": [0.70, 0.71, 0.72], "topk-0.2": [0.75, 0.761, 0.769], "magnitude": [0.71, 0.70, 0.74]}
    fvu: Values = {"full": [0.20, 0.21, 0.22], "topk-0.2": [0.19, 0.21, 0.211], "magnitude": [0.20, 0.215, 0.22]}
    family = [one for one in differences(k1, fvu) if one.planned and one.p is not None]
    assert {one.metric for one in family} == {"sparse_probing_1", "fvu"}
    assert [one.p_holm for one in family] == pytest.approx(holm([one.p for one in family if one.p is not None]))
    assert {one.family for one in family} == {4}
    # Where a metric is the same everywhere there is nothing to test, and it is no part of the family.
    assert entry(differences(k1), "magnitude", metric="fvu").family is None
    assert {one.family for one in differences(k1) if one.p_holm is not None} == {2}


def test_arms_share_their_variance_unless_one_varies_much_more() -> None:
    rng = np.random.default_rng(0)
    names = ("full", "magnitude", "topk-0.2", "unweighted", "row")
    values: Values = {arm: (0.7 + 0.01 * rng.standard_normal(4)).tolist() for arm in names}
    found = entry(differences(values), "magnitude")
    alone = paired([(ours or 0) - (theirs or 0) for ours, theirs in zip(values["magnitude"], values["full"], strict=True)])
    assert found.difference == pytest.approx(alone.mean)
    assert (found.df, alone.df) == (4 * 3, 3)
    assert found.spread_ratio is not None
    assert found.spread_ratio > 1
    values["row"] = [0.2, 0.9, 0.5, 0.7]
    apart = entry(differences(values), "magnitude")
    assert (apart.df, apart.low, apart.high) == (3, alone.low, alone.high)
    assert apart.spread_ratio is not None
    assert apart.spread_ratio > 4
    two = entry(differences({arm: values[arm] for arm in names[:3]}), "magnitude")
    assert (two.df, two.spread_ratio) == (3, None)


@pytest.mark.parametrize(
    ("full", "other", "verdict"),
    [
        ([0.70, 0.71, 0.72], [0.75, 0.7601, 0.7699], "Better by more than 0.01."),
        ([0.75, 0.7601, 0.7699], [0.70, 0.71, 0.72], "Worse by more than 0.01."),
        ([0.70, 0.71, 0.72], [0.702, 0.7121, 0.7219], "Better, by less than 0.01."),
        ([0.70, 0.71, 0.72, 0.71], [0.7001, 0.7098, 0.7202, 0.7099], "Equal within 0.01."),
        ([0.70, 0.71, 0.72], [0.70, 0.71, 0.72], "Exactly the same in every seed: the two arms never differed."),
        ([0.70], [0.75], "One seed: nothing can be told."),
        ([0.70, 0.71], [None, None], "Not measured in both arms."),
        ([0.5, 0.5, 0.5], [0.75, 0.75, 0.75], "The same difference in every seed: no spread to test it against."),
    ],
)
def test_verdicts(full: list[float], other: list[float | None], verdict: str) -> None:
    found = entry(differences({"full": [*full], "magnitude": other}), "magnitude")
    assert found.verdict == verdict
    first = verdict.split(maxsplit=1)[0].rstrip(",").lower()
    assert found.outcome == (first if first in ("better", "worse", "equal") else "not judged")


def test_undecided_says_what_could_have_been_told() -> None:
    found = entry(differences({"full": [0.70, 0.71, 0.72], "magnitude": [0.71, 0.70, 0.74]}), "magnitude")
    # Differences .01, -.01, .02 with 2 degrees of freedom: sd .01528, standard error .00882.
    assert found.least is not None
    shift = found.least / (found.sd or 1) * 3**0.5
    assert stats.nct.sf(stats.t.isf(0.025, 2), 2, shift) == pytest.approx(0.8, abs=1e-6)
    assert found.verdict == f"Undecided: 3 seeds cannot tell a difference of less than {found.least:.3f}."


def test_failed_seeds_are_named_and_never_better() -> None:
    found = study({"full": [0.70, 0.71, 0.72, 0.7], "magnitude": [0.75, 0.7601, 0.7699, None]})
    rows = [
        one.model_copy(update={"degenerate": "nothing fires"}) if (one.arm, one.seed) == ("magnitude", 3) else one
        for one in found.rows
    ]
    better = entry(compared(found, rows=tuple(rows)).differences, "magnitude")
    assert (better.seeds, better.failed) == (3, 1)
    assert better.verdict == "Better where both finished, but one SAE failed: not told."
    assert better.outcome == "not judged"


def test_fvu_at_another_l0_is_not_called_better() -> None:
    arms: Values = {"full": [0.7, 0.7, 0.7], "magnitude": [0.7, 0.7, 0.7]}
    low: list[float | None] = [0.15, 0.1601, 0.1699]
    high: list[float | None] = [0.20, 0.21, 0.22]
    near: Values = {"full": [20.0, 20.0, 20.0], "magnitude": [20.5, 20.5, 20.5]}
    far: Values = {"full": [20.0, 20.0, 20.0], "magnitude": [30.0, 30.0, 30.0]}

    def verdict(fvu: Values, l0: Values) -> str | None:
        return entry(differences(arms, fvu, l0), "magnitude", metric="fvu").verdict

    assert verdict({"full": high, "magnitude": low}, near) == "Better by more than 0.01."
    assert verdict({"full": high, "magnitude": low}, far) == (
        "Lower, but at another L0 (+50.0%), which alone can make a difference of 0.085: which of the two is better, this "
        "does not tell."
    )
    # More latents and a worse reconstruction: L0 excuses nothing.
    assert verdict({"full": low, "magnitude": high}, far) == (
        "Worse by more than 0.01. L0 differs by +50.0%, which alone would have made it better."
    )


def test_tasks_are_counted_and_not_resampled() -> None:
    found = entry(differences({"full": [0.70, 0.71], "magnitude": [0.75, 0.75]}), "magnitude")
    assert (found.tasks, found.tasks_higher) == (2, 1)


def test_summary_counts_what_can_be_told() -> None:
    found = differences({"full": [0.70, 0.71, 0.72], "topk-0.2": [0.75, 0.761, 0.769]})
    assert summary(found) == (
        "Of the 2 planned comparisons, 1 can be told from seed noise, at 3 seeds. Where nothing differs, and all "
        "arms vary about as much between seeds, at most 5 % of studies like this one tell of a difference."
    )
    assert "at least two seeds" in summary(differences({"full": [0.70], "topk-0.2": [0.75]}))
    assert summary([]) == "No comparison was planned of the arms in this study."


def test_every_built_in_arm_has_a_planned_comparison() -> None:
    values: Values = {arm: [0.7, 0.71] for arm in ARMS}
    found = differences(values, bases={name: arm.base for name, arm in ARMS.items() if name != "full"})
    assert {one.arm for one in found if one.planned} == set(ARMS) - {"full"}


def test_saes_that_others_trained_are_shown_and_not_compared() -> None:
    found = study({"full": [0.70, 0.71], "scope": [0.75, 0.761], "magnitude": [0.70, 0.74]})
    arms = tuple(
        arm.model_copy(update={"question": None, "base": None}) if arm.arm == "scope" else arm for arm in found.arms
    )
    names = {name for one in compared(found, arms=arms).differences for name in (one.arm, one.reference)}
    assert names == {"full", "magnitude"}


def test_an_arm_whose_l0_was_searched_for_does_not_keep_the_others_from_sharing_their_variance() -> None:
    values: Values = {arm: [0.70 + 0.001 * shift, 0.72, 0.74 - 0.001 * shift] for arm, shift in
                      (("full", 0), ("a", 1), ("b", 2), ("c", -1), ("searched", 40))}  # fmt: skip
    results = study(values)
    arms = tuple(arm.model_copy(update={"matched": arm.arm == "searched"}) for arm in results.arms)
    alone, marked = results.differences, compared(results, arms=arms).differences
    assert entry(alone, "a").df == 2  # Cochran's test sees one arm that varies much more
    assert (entry(marked, "a").df, entry(marked, "searched").df) == (6, 2)
    assert entry(marked, "searched").spread_ratio is None
