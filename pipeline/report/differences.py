"""Computes the differences between arms of one layer, how certain they are, and a verdict on each planned one.

Planned are the metrics that say so in their entry (`metrics.METRICS`), of every arm against the arm it changes
(`study.arms.Arm.base`). Every other difference is exploratory: it has an interval, but no verdict.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scipy import stats

from pipeline.report.columns import Caveat, Column, Group, Metric, mean
from pipeline.report.frontier import Along, Pair, pairs
from pipeline.report.metrics import L0, SAME_DIRECTION, compared
from pipeline.report.results import Difference, Results, Row
from pipeline.report.statistics import CONFIDENCE, holm, paired, seeds_needed
from pipeline.report.text import count, signed

REFERENCES = ("full", "no-contrast", "baseline")
"""Every arm is compared with these too, where the study has them."""
ALPHA = 1 - CONFIDENCE
STEEPEST = 1.0
"""Largest |d log metric / d log L0| that two arms at different L0 are allowed for under `Caveat.equal_l0`
(docs/method.md, "Differences between arms")."""
SAME_LATENT = 0.5
"""Mean cosine to the baseline's latents of the same index, below which `Caveat.same_latents` withholds a verdict."""


def differences(results: Results) -> list[Difference]:
    """One entry per layer, metric, reference and arm, in that order: arm minus reference, over the seeds both have."""
    found: list[Difference] = []
    bases = {arm.arm: arm.base for arm in results.arms if arm.question is not None}
    references = [arm for arm in bases if arm in REFERENCES or arm in bases.values()]
    metrics = compared(results)
    for layer in dict.fromkeys(row.layer for row in results.rows):
        rows, tasks = results.whole_layer(layer), [task.name for task in results.tasks]
        for metric in metrics:
            entries = [
                _difference(rows, tasks, metric, arm, reference, planned=_planned(metric, arm, reference, bases))
                for reference in references
                for arm in bases
                if arm != reference
            ]
            found += _judged(entries, metric)
    return found


def _planned(metric: Metric, arm: str, reference: str, bases: Mapping[str, str | None]) -> bool:
    plan = metric.planned
    return plan is not None and bases[arm] == reference and not {arm, reference} & set(plan.not_for)


def _difference(
    rows: Sequence[Row], tasks: Sequence[str], metric: Metric, arm: str, reference: str, *, planned: bool
) -> Difference:
    measured = [pair for pair in pairs(rows, arm, reference) if pair.values(metric)]
    values = [found for pair in measured if (found := pair.values(metric))]
    found = paired([each.ours - each.theirs for each in values]) if values else None
    errors = [each.error for each in values if each.error is not None]
    by_task = _tasks(measured, metric, tasks)
    l0_ratio = _l0_ratio(measured) if metric.caveat == Caveat.equal_l0 else None
    size = mean([abs(each.theirs) for each in values]) if values else 0.0
    return Difference(
        layer=rows[0].layer,
        metric=metric.name,
        arm=arm,
        reference=reference,
        planned=planned,
        better=metric.better,
        seeds=len(values),
        difference=found and found.mean,
        sd=found and found.sd,
        low=found and found.low,
        high=found and found.high,
        p=found and found.p,
        bootstrap_low=found and found.bootstrap_low,
        bootstrap_high=found and found.bootstrap_high,
        l0_ratio=l0_ratio,
        l0_allowance=None if l0_ratio is None else STEEPEST * abs(math.log(l0_ratio)) * size,
        interpolation_error=mean(errors) if errors else None,
        same_direction=_same_direction(measured) if metric.caveat == Caveat.same_latents else None,
        tasks=len(by_task) or None,
        tasks_higher=sum(change > 0 for change in by_task) if by_task else None,
    )


def _means(measured: Sequence[Pair], column: Column) -> tuple[float, float] | None:
    """A metric's mean over the seeds, of the arm and of the reference; None where a value is missing."""
    found = [values for pair in measured if (values := pair.values(column))]
    if not found or len(found) < len(measured):
        return None
    return mean([each.ours for each in found]), mean([each.theirs for each in found])


def _l0_ratio(measured: Sequence[Pair]) -> float | None:
    """Mean L0 of the arm over that of the reference."""
    means = None if any(isinstance(pair, Along) for pair in measured) else _means(measured, L0)
    return means[0] / means[1] if means and all(means) else None


def _same_direction(measured: Sequence[Pair]) -> float | None:
    """Mean cosine to the baseline's latents of the same index, of the less similar of the two arms."""
    means = _means(measured, SAME_DIRECTION)
    return min(means) if means else None


def _tasks(measured: Sequence[Pair], metric: Metric, tasks: Sequence[str]) -> list[float]:
    """The difference in each probing task, mean over seeds; tasks are not resampled, see docs/method.md."""
    if metric.group != Group.probing:
        return []
    found = [_means(measured, Column(("sparse_probing_by_task", task, metric.path[-1]))) for task in tasks]
    return [means[0] - means[1] for means in found if means]


def _judged(entries: Sequence[Difference], metric: Metric) -> list[Difference]:
    """The entries of one metric; the planned ones get p values corrected for their number, and verdicts."""
    tested = [p for entry in entries if entry.planned and (p := _tested(entry)) is not None]
    corrected = iter(holm(tested))
    judged: list[Difference] = []
    for entry in entries:
        changes: dict[str, Any] = {}
        if entry.planned and entry.p is not None and entry.difference is not None and entry.sd is not None:
            # Bonferroni's level: that many seeds suffice, however the other arms of the family turn out.
            level = ALPHA / len(tested)
            changes = {"p_holm": next(corrected), "family": len(tested)}
            changes["seeds_for_this"] = seeds_needed(entry.difference, entry.sd, level)
            if metric.planned and metric.planned.worth:
                changes["seeds_for_worth"] = seeds_needed(metric.planned.worth, entry.sd, level)
        entry = entry.model_copy(update=changes)
        judged.append(entry.model_copy(update={"verdict": _verdict(entry, metric)}) if entry.planned else entry)
    return judged


def _tested(entry: Difference) -> float | None:
    """p of the hypothesis that the difference is at most what its L0 alone could make; of no difference at equal L0."""
    if entry.p is None or not entry.l0_allowance or not entry.sd or entry.difference is None:
        return entry.p
    beyond = (abs(entry.difference) - entry.l0_allowance) / (entry.sd / math.sqrt(entry.seeds))
    return float(min(1.0, 2 * stats.t.sf(beyond, entry.seeds - 1)))


def _verdict(entry: Difference, metric: Metric) -> str:
    if entry.seeds == 0 or entry.difference is None:
        return "Not measured in both arms."
    if entry.seeds == 1:
        return "One seed: nothing can be told."
    if entry.p is None or entry.p_holm is None:
        if entry.difference:
            return "The same difference in every seed: no spread to test it against."
        return "Exactly the same in every seed: the two arms never differed."
    direction = "higher" if entry.difference > 0 else "lower"
    if entry.p_holm >= ALPHA and entry.l0_allowance and entry.l0_ratio and entry.p * (entry.family or 1) < ALPHA:
        change, most = signed(f"{100 * (entry.l0_ratio - 1):.1f}%"), metric.show(entry.l0_allowance)
        at = f"{direction.capitalize()}, but at another L0 ({change}), which alone can make a difference of {most}"
        return f"{at}: which of the two is better, this does not tell."
    if entry.p_holm >= ALPHA:
        return _not_told(entry, metric)
    if entry.interpolation_error is not None and entry.interpolation_error >= abs(entry.difference):
        return f"{direction.capitalize()}, but by less than the interpolation between L0 is uncertain by: not told."
    if entry.same_direction is not None and entry.same_direction < SAME_LATENT:
        return f"{direction.capitalize()}, but the latents have turned away from the baseline’s: its pairs mean others now."
    return "Better." if direction == metric.better else "Worse."


def _not_told(entry: Difference, metric: Metric) -> str:
    """The verdict on a difference that is not significant."""
    lone = ""
    if entry.p is not None and entry.p < ALPHA:
        lone = " Alone it would count as one; among these comparisons it does not."
    needed = f"one of this size would need {_seeds(entry.seeds_for_this)} seeds"
    worth = metric.planned.worth if metric.planned else None
    if worth is not None:
        needed += f", one of {metric.show(worth).rstrip('0')} {_seeds(entry.seeds_for_worth)}"
    return f"No difference can be told at {entry.seeds} seeds; {needed}.{lone}"


def _seeds(needed: int | None) -> str:
    return "more than 1,000" if needed is None else f"about {count(needed)}"


def is_significant(entry: Difference) -> bool:
    """True if a planned difference is significant after correction."""
    return entry.p_holm is not None and entry.p_holm < ALPHA


def summary(entries: Iterable[Difference]) -> str:
    """How many planned differences of a layer are significant, in a sentence."""
    planned = [entry for entry in entries if entry.planned]
    if not planned:
        return "No comparison was planned of the arms in this study."
    number = f"{count(len(planned))} planned comparisons" if len(planned) > 1 else "one planned comparison"
    seeds = max(entry.seeds for entry in planned)
    if seeds < 2:
        return f"None of the {number} can be decided: it takes at least two seeds of both arms."
    return f"Of the {number}, {sum(map(is_significant, planned)) or 'none'} can be told from seed noise, at {seeds} seeds."
