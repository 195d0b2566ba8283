"""Differences between the arms of one layer: which were planned, how sure they are, and what that means in words.

Planned are the metrics of `PLANNED`, of every arm against the arm it changes (`study.arms.Arm.base`), whose question
says what that difference tells. Every other difference is exploratory: it has an interval, but no verdict.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any, NamedTuple

from pipeline.report.metrics import (
    DEAD,
    F1,
    FOUND,
    FVU,
    GEOMETRY,
    INTERFERENCE,
    L0,
    ONE_TO_ONE,
    REBUILDS,
    RECONSTRUCTED,
    RECOVERED,
    SILENT,
    UNION,
    Metric,
    Results,
    Row,
    Rows,
    mean,
    measured,
    pick,
    probing,
)
from pipeline.report.statistics import CONFIDENCE, Paired, holm, paired, seeds_needed
from pipeline.report.text import count, signed

REFERENCES = ("full", "no-contrast", "baseline")
"""Every arm is compared with these too, where the study has them."""
ALPHA = 1 - CONFIDENCE
L0_TOLERANCE = 0.05
"""Two arms whose L0 differs by a larger share are not comparable in what more active latents improve by themselves."""
SAME_LATENT = 0.5
"""Mean cosine to the baseline's latents of the same index, below which the baseline's pairs are no longer an arm's."""
GROWS_WITH_L0 = ("fvu", "cosine", "loss_recovered_zero", "loss_recovered_mean")


COLUMNS = (
    "layer", "metric", "arm", "reference", "planned", "better", "seeds", "difference", "sd", "low", "high", "p",
    "bootstrap_low", "bootstrap_high", "l0_ratio", "same_direction", "tasks", "tasks_higher", "p_holm", "family",
    "seeds_for_this", "seeds_for_worth", "verdict",
)  # fmt: skip
"""What every entry of `differences` has."""


class Planned(NamedTuple):
    """A metric that the study was made to compare arms by; which direction is better, the metric says."""

    metric: str
    heading: str
    worth: float | None = None
    """A difference that would matter, for which the seeds needed are given beside those for the one observed."""
    not_for: tuple[str, ...] = ()
    """Arms left out of this comparison."""


PLANNED = (
    Planned("sparse_probing_1", "Sparse probing accuracy, k = 1", worth=0.01),
    Planned("sparse_probing_5", "Sparse probing accuracy, k = 5", worth=0.01),
    Planned(FVU.name, "FVU (comparable at equal L0 only)", worth=0.01),
    Planned(ONE_TO_ONE.name, "True features found, one latent to each", worth=0.01),
    Planned(SILENT.name, "Parents silent beside their child (absorption)", worth=0.01),
    # The pairs are chosen for what they do in `baseline`, which is therefore not to be compared on them.
    Planned(INTERFERENCE.name, "Interference on the baseline’s pairs", not_for=("baseline",)),
)
"""The pair capture rate is not among them and never ranks an arm: it must fall when the penalty works."""


def compared_metrics(results: Results) -> list[Metric]:
    """Every metric that some SAE of the study has and whose difference says something."""
    metrics = [
        *probing(results),
        FVU,
        L0,
        RECOVERED,
        DEAD,
        *REBUILDS,
        FOUND,
        ONE_TO_ONE,
        F1,
        SILENT,
        *GEOMETRY,
        INTERFERENCE,
        UNION,
        *RECONSTRUCTED,
    ]
    return measured(results["rows"], dict.fromkeys(metrics))


def differences(results: Results) -> list[dict[str, Any]]:
    """One entry per layer, metric, reference and arm, in that order: arm minus reference, over the seeds both have."""
    found: list[dict[str, Any]] = []
    bases: dict[str, str | None] = {arm["arm"]: arm["base"] for arm in results["arms"]}
    references = [arm for arm in bases if arm in REFERENCES or arm in bases.values()]
    for layer in dict.fromkeys(row["layer"] for row in results["rows"]):
        rows = [row for row in results["rows"] if row["layer"] == layer]
        for metric in compared_metrics(results):
            entries = [
                {
                    "layer": layer,
                    **_difference(rows, metric, arm, reference, planned=_planned(metric, arm, reference, bases)),
                }
                for reference in references
                for arm in bases
                if arm != reference
            ]
            _judge([entry for entry in entries if entry["planned"]], metric)
            found += entries
    return found


def _planned(metric: Metric, arm: str, reference: str, bases: Mapping[str, str | None]) -> bool:
    plan = next((plan for plan in PLANNED if plan.metric == metric.name), None)
    return plan is not None and bases[arm] == reference and not {arm, reference} & set(plan.not_for)


def _difference(rows: Rows, metric: Metric, arm: str, reference: str, *, planned: bool) -> dict[str, Any]:
    pairs = list(_pairs(rows, metric, arm, reference))
    statistics = dict.fromkeys(field.name for field in fields(Paired)) | {"n": 0}
    if pairs:
        statistics = asdict(paired([pick(ours, *metric.path) - pick(theirs, *metric.path) for ours, theirs in pairs]))
    return {
        "metric": metric.name,
        "arm": arm,
        "reference": reference,
        "planned": planned,
        "better": metric.better,
        "seeds": statistics.pop("n"),
        "difference": statistics.pop("mean"),
        **statistics,
        "l0_ratio": _ratio(pairs) if metric.name in GROWS_WITH_L0 else None,
        "same_direction": _same_direction(pairs) if metric == INTERFERENCE else None,
        **_tasks(pairs, metric),
        **dict.fromkeys(("p_holm", "family", "seeds_for_this", "seeds_for_worth", "verdict")),
    }


def _pairs(rows: Rows, metric: Metric, arm: str, reference: str) -> Iterable[tuple[Row, Row]]:
    """The rows of both arms, seed by seed, where both hold the metric."""
    theirs = {row["seed"]: row for row in rows if row["arm"] == reference}
    for row in rows:
        other = theirs.get(row["seed"])
        if row["arm"] == arm and other and None not in (pick(row, *metric.path), pick(other, *metric.path)):
            yield row, other


def _ratio(pairs: Sequence[tuple[Row, Row]]) -> float | None:
    """Mean L0 of the arm over that of the reference."""
    if not pairs or not all(theirs["l0"] for _, theirs in pairs):
        return None
    return mean([ours["l0"] for ours, _ in pairs]) / mean([theirs["l0"] for _, theirs in pairs])


def _same_direction(pairs: Sequence[tuple[Row, Row]]) -> float | None:
    """How far the indices of the less faithful of two arms still mean the baseline's latents."""
    if not pairs:
        return None
    return min(mean([row["interference"]["fixed"]["same_direction"] for row in side]) for side in zip(*pairs, strict=True))


def _tasks(pairs: Sequence[tuple[Row, Row]], metric: Metric) -> dict[str, int | None]:
    """In how many probing tasks the arm is higher, mean over seeds; tasks are not resampled, see docs/method.md."""
    if metric.path[0] != "sparse_probing" or not pairs:
        return {"tasks": None, "tasks_higher": None}
    k = metric.path[1]
    by_task = [
        mean([ours["sparse_probing_by_task"][task][k] - theirs["sparse_probing_by_task"][task][k] for ours, theirs in pairs])
        for task in pairs[0][0]["sparse_probing_by_task"]
    ]
    return {"tasks": len(by_task), "tasks_higher": sum(value > 0 for value in by_task)}


def _judge(family: list[dict[str, Any]], metric: Metric) -> None:
    """Correct the planned differences of one metric for being many, and put each into words."""
    tested = [entry for entry in family if entry["p"] is not None]
    plan = next((plan for plan in PLANNED if plan.metric == metric.name), None)
    for entry, corrected in zip(tested, holm([entry["p"] for entry in tested]), strict=True):
        entry["p_holm"] = corrected
        entry["family"] = len(tested)
        # Bonferroni's level: that many seeds do, however the other arms of the family turn out.
        level = ALPHA / len(tested)
        entry["seeds_for_this"] = seeds_needed(entry["difference"], entry["sd"], level)
        if plan and plan.worth:
            entry["seeds_for_worth"] = seeds_needed(plan.worth, entry["sd"], level)
    for entry in family:
        entry["verdict"] = _verdict(entry, metric, plan.worth if plan else None)


def _verdict(entry: Mapping[str, Any], metric: Metric, worth: float | None) -> str:
    n, difference = entry["seeds"], entry["difference"]
    if n == 0:
        return "Not measured in both arms."
    if n == 1:
        return "One seed: nothing can be told."
    if entry["p"] is None:
        if difference:
            return "The same difference in every seed: no spread to test it against."
        return "Exactly the same in every seed: the two arms never differed."
    if entry["p_holm"] >= ALPHA:
        lone = " Alone it would count as one; among these comparisons it does not." if entry["p"] < ALPHA else ""
        needed = f"one of this size would need {_seeds(entry['seeds_for_this'])} seeds"
        if worth is not None:
            needed += f", one of {metric.show(worth).rstrip('0')} {_seeds(entry['seeds_for_worth'])}"
        return f"No difference can be told at {n} seeds; {needed}.{lone}"
    direction = "higher" if difference > 0 else "lower"
    ratio = entry["l0_ratio"]
    if ratio is not None and abs(ratio - 1) > L0_TOLERANCE:
        change = signed(f"{100 * (ratio - 1):.0f}%")
        return f"{direction.capitalize()}, but at another L0 ({change}): which of the two is better, this does not tell."
    if entry["same_direction"] is not None and entry["same_direction"] < SAME_LATENT:
        return f"{direction.capitalize()}, but the latents have turned away from the baseline’s: its pairs mean others now."
    return "Better." if direction == metric.better else "Worse."


def _seeds(needed: int | None) -> str:
    return "more than 1,000" if needed is None else f"about {count(needed)}"


def summary(entries: Iterable[Mapping[str, Any]]) -> str:
    """What the planned differences of a layer come to, in a sentence."""
    planned = [entry for entry in entries if entry["planned"]]
    told = [entry for entry in planned if entry["p_holm"] is not None and entry["p_holm"] < ALPHA]
    if not planned:
        return "No comparison was planned of the arms in this study."
    number = f"{count(len(planned))} planned comparisons" if len(planned) > 1 else "one planned comparison"
    seeds = max(entry["seeds"] for entry in planned)
    if seeds < 2:
        return f"None of the {number} can be decided: it takes at least two seeds of both arms."
    return f"Of the {number}, {len(told) or 'none'} can be told from the luck of {seeds} seeds."
