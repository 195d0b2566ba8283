"""Which differences are planned, how they are paired and corrected, and what is said of them."""

import pytest
from small_results import altered, compared, results_of, row

from pipeline.report.columns import Metric
from pipeline.report.differences import summary
from pipeline.report.metrics import METRICS
from pipeline.report.results import Difference, Results
from pipeline.report.statistics import holm, seeds_needed
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


def differences_on_pairs(k1: Values, same_direction: dict[str, float]) -> tuple[Difference, ...]:
    """The same where every SAE is measured on the baseline's pairs too; `full` interferes most."""
    found = study(k1)
    rows = [
        altered(
            one,
            {
                ("interference",): {
                    "own": None,
                    "fixed": {
                        "interference": 0.5 + 0.001 * one.seed**2 if one.arm == "full" else 0.2 + 0.001 * one.seed,
                        "same_direction": same_direction.get(one.arm, 0.9),
                    },
                    "reason": None,
                }
            },
        )
        for one in found.rows
    ]
    return compared(found, rows=tuple(rows)).differences


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


def test_the_baseline_is_not_compared_on_pairs_chosen_in_it() -> None:
    found = differences_on_pairs({"baseline": [0.7, 0.7], "full": [0.7, 0.71], "magnitude": [0.7, 0.72]}, {})
    metric = "interference_fixed_interference"
    assert {one.arm for one in found if one.planned and one.metric == metric} == {"magnitude"}


def test_a_family_is_the_arms_of_one_metric() -> None:
    found = differences({"full": [0.70, 0.71, 0.72], "topk-0.2": [0.75, 0.761, 0.769], "magnitude": [0.71, 0.70, 0.74]})
    family = [one for one in found if one.planned and one.metric == "sparse_probing_1"]
    assert [one.p_holm for one in family] == pytest.approx(holm([one.p for one in family]))
    assert [one.family for one in family] == [2, 2]
    magnitude = entry(found, "magnitude")
    assert magnitude.seeds_for_this == seeds_needed(magnitude.difference, magnitude.sd, 0.05 / 2)
    assert magnitude.seeds_for_worth == seeds_needed(0.01, magnitude.sd, 0.05 / 2)
    # FVU is the same everywhere: nothing to test, and no part of another metric's family.
    assert entry(found, "magnitude", metric="fvu").family is None


@pytest.mark.parametrize(
    ("full", "other", "verdict"),
    [
        ([0.70, 0.71, 0.72], [0.75, 0.761, 0.771], "Better."),
        ([0.75, 0.761, 0.771], [0.70, 0.71, 0.72], "Worse."),
        ([0.70, 0.71, 0.72], [0.70, 0.71, 0.72], "Exactly the same in every seed: the two arms never differed."),
        ([0.70], [0.75], "One seed: nothing can be told."),
        ([0.70, 0.71], [None, None], "Not measured in both arms."),
        ([0.5, 0.5, 0.5], [0.75, 0.75, 0.75], "The same difference in every seed: no spread to test it against."),
    ],
)
def test_verdicts(full: list[float], other: list[float | None], verdict: str) -> None:
    assert entry(differences({"full": [*full], "magnitude": other}), "magnitude").verdict == verdict


def test_a_verdict_without_a_difference_says_how_many_seeds_it_would_take() -> None:
    found = entry(differences({"full": [0.70, 0.71, 0.72], "magnitude": [0.71, 0.70, 0.74]}), "magnitude")
    # Differences .01, -.01, .02: mean .00667, sd .01528, d_z .436. The normal approximation is
    # (1.960 + .842)^2 / .436^2 = 41.2 pairs, and 18.3 for .01; Student's t takes two or three more.
    assert found.verdict == (
        "No difference can be told at 3 seeds; one of this size would need about 44 seeds, one of 0.01 about 21."
    )


def test_fvu_at_another_l0_is_not_called_better() -> None:
    arms: Values = {"full": [0.7, 0.7, 0.7], "magnitude": [0.7, 0.7, 0.7]}
    fvu: Values = {"full": [0.20, 0.21, 0.22], "magnitude": [0.15, 0.161, 0.171]}
    near: Values = {"full": [20.0, 20.0, 20.0], "magnitude": [20.5, 20.5, 20.5]}
    far: Values = {"full": [20.0, 20.0, 20.0], "magnitude": [30.0, 30.0, 30.0]}
    assert entry(differences(arms, fvu, near), "magnitude", metric="fvu").verdict == "Better."
    assert entry(differences(arms, fvu, far), "magnitude", metric="fvu").verdict == (
        "Lower, but at another L0 (+50.0%), which alone can make a difference of 0.085: which of the two is better, this "
        "does not tell."
    )


@pytest.mark.parametrize(("same_direction", "verdict"), [(0.9, "Better."), (0.1, "Lower, but the latents have turned away")])
def test_interference_says_nothing_where_indices_mean_other_latents(same_direction: float, verdict: str) -> None:
    found = differences_on_pairs({"full": [0.7] * 3, "magnitude": [0.7] * 3}, {"magnitude": same_direction})
    found = entry(found, "magnitude", metric="interference_fixed_interference")
    assert found.same_direction == pytest.approx(same_direction)
    assert found.verdict.startswith(verdict)


def test_tasks_are_counted_and_not_resampled() -> None:
    found = entry(differences({"full": [0.70, 0.71], "magnitude": [0.75, 0.75]}), "magnitude")
    assert (found.tasks, found.tasks_higher) == (2, 1)


def test_summary_counts_what_can_be_told() -> None:
    found = differences({"full": [0.70, 0.71, 0.72], "topk-0.2": [0.75, 0.761, 0.769]})
    assert summary(found) == "Of the 2 planned comparisons, 1 can be told from seed noise, at 3 seeds."
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
