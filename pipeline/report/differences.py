"""Computes the differences between arms, how certain they are, and a verdict on each planned one.

Planned are the metrics that say so in their entry (`metrics.METRICS`), of every arm against the arm it changes
(`study.arms.Arm.base`). Every other difference is exploratory: it has an interval, but no verdict.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from scipy import stats

from pipeline.report.columns import Column, Group, Metric, mean
from pipeline.report.frontier import Along, Pair, pairs
from pipeline.report.metrics import L0, compared
from pipeline.report.results import Difference, Results, Row
from pipeline.report.statistics import FEWEST_POOLED, Paired, holm, least_found, paired, pooled, with_variance
from pipeline.report.text_noise import ProbeTexts
from pipeline.report.verdicts import ALPHA, dominated, verdict

REFERENCES = ("full", "no-contrast", "baseline")
"""Every arm is compared with these too, where the study has them."""
STEEPEST = 1.0
"""Largest |d log metric / d log L0| that two arms at different L0 are allowed for under `Caveat.equal_l0`
(docs/method.md, "Differences between arms")."""


def differences(results: Results) -> list[Difference]:
    """One entry per layer, metric, reference and arm, in that order: arm minus reference, over the seeds both have."""
    found: list[Difference] = []
    bases = {arm.arm: arm.base for arm in results.arms if arm.question is not None}
    matched = {arm.arm for arm in results.arms if arm.matched}
    references = [arm for arm in bases if arm in REFERENCES or arm in bases.values()]
    metrics = {metric.name: metric for metric in compared(results)}
    for layer in dict.fromkeys(row.layer for row in results.rows):
        rows, tasks, texts = results.whole_layer(layer), [task.name for task in results.tasks], ProbeTexts()
        for metric in metrics.values():
            taken = [
                _taken(rows, tasks, texts, metric, arm, reference, planned=_planned(metric, arm, reference, bases))
                for reference in references
                for arm in bases
                if arm != reference
            ]
            found += map(_widened, _together(taken, matched))
    return _judged(found, metrics)


def _planned(metric: Metric, arm: str, reference: str, bases: Mapping[str, str | None]) -> bool:
    plan = metric.planned
    return plan is not None and bases[arm] == reference


def _taken(
    rows: Sequence[Row],
    tasks: Sequence[str],
    texts: ProbeTexts,
    metric: Metric,
    arm: str,
    reference: str,
    *,
    planned: bool,
) -> tuple[Difference, dict[int, float]]:
    """A difference, tested by itself, and its value in each seed."""
    measured = [pair for pair in pairs(rows, arm, reference) if pair.values(metric)]
    values = {pair.seed: found for pair in measured if (found := pair.values(metric))}
    by_seed = {seed: each.ours - each.theirs for seed, each in values.items()}
    found = paired([*by_seed.values()]) if by_seed else None
    errors = [each.error for each in values.values() if each.error is not None]
    by_task = _tasks(measured, metric, tasks)
    variance = texts.variance(measured, metric.path[-1]) if metric.group == Group.probing else None
    l0_ratio = _l0_ratio(measured) if metric.caveat else None
    size = mean([abs(each.theirs) for each in values.values()]) if values else 0.0
    entry = Difference(
        layer=rows[0].layer,
        metric=metric.name,
        arm=arm,
        reference=reference,
        planned=planned,
        better=metric.better,
        seeds=len(values),
        difference=found and found.mean,
        **_tested_by(found),
        l0_ratio=l0_ratio,
        l0_allowance=None if l0_ratio is None else STEEPEST * abs(math.log(l0_ratio)) * size,
        interpolation_error=mean(errors) if errors else None,
        tasks=len(by_task) or None,
        tasks_higher=sum(change > 0 for change in by_task) if by_task else None,
        text_error=None if variance is None else math.sqrt(variance),
        failed=sum(row.arm in (arm, reference) and row.degenerate is not None for row in rows),
    )
    return entry, by_seed


def _tested_by(found: Paired | None) -> dict[str, Any]:
    return {name: found and getattr(found, name) for name in ("sd", "df", "low", "high", "p")}


def _together(taken: Sequence[tuple[Difference, dict[int, float]]], matched: Collection[str]) -> list[Difference]:
    """The differences of one metric and layer; planned ones to the same reference share their variance, if they can.

    An arm that is `matched` shares none: where its search for L0 ended is another source of differences between seeds.
    """
    changed: dict[tuple[str, str], Difference] = {}
    for reference in dict.fromkeys(entry.reference for entry, _ in taken):
        planned = [(entry, by_seed) for entry, by_seed in taken if entry.planned and entry.reference == reference]
        planned = [(entry, by_seed) for entry, by_seed in planned if entry.arm not in matched]
        seeds = max((set(by_seed) for _, by_seed in planned), key=len, default=set[int]())
        whole = [(entry, [by_seed[seed] for seed in seeds]) for entry, by_seed in planned if set(by_seed) == seeds]
        if min(len(whole), len(seeds)) < FEWEST_POOLED:
            continue
        found = pooled([values for _, values in whole])
        for (entry, _), tested in zip(whole, found.arms, strict=True):
            changes: dict[str, Any] = {"spread_ratio": found.ratio, "skewed": found.skewed} | (
                _tested_by(tested) if found.pooled else {}
            )
            changed[entry.arm, reference] = entry.model_copy(update=changes)
    return [changed.get((entry.arm, entry.reference), entry) if entry.planned else entry for entry, _ in taken]


def _widened(entry: Difference) -> Difference:
    """A difference with the part of its error that comes from the test texts."""
    if entry.text_error is None or entry.difference is None:
        return entry
    known = {name: getattr(entry, name) for name in ("sd", "df", "low", "high", "p")}
    found = with_variance(Paired(n=entry.seeds, mean=entry.difference, **known), entry.text_error**2)
    return entry.model_copy(update=_tested_by(found))


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


def _tasks(measured: Sequence[Pair], metric: Metric, tasks: Sequence[str]) -> list[float]:
    """The difference in each probing task, mean over seeds; tasks are not resampled, see docs/method.md."""
    if metric.group != Group.probing:
        return []
    found = [_means(measured, Column(("sparse_probing_by_task", task, metric.path[-1]))) for task in tasks]
    return [means[0] - means[1] for means in found if means]


def _judged(entries: Sequence[Difference], metrics: Mapping[str, Metric]) -> list[Difference]:
    """The planned ones of the whole page get p values corrected for their number, and verdicts."""
    tested = {
        number: p
        for number, entry in enumerate(entries)
        if entry.planned and (p := _tested(entry, metrics[entry.metric])) is not None
    }
    corrected = dict(zip(tested, holm([*tested.values()]), strict=True))
    judged: list[Difference] = []
    for number, entry in enumerate(entries):
        if not entry.planned:
            judged.append(entry)
            continue
        changes: dict[str, Any] = {}
        if number in corrected and entry.sd and entry.df:
            changes = {"p_holm": corrected[number], "family": len(tested)}
            changes["least"] = least_found(entry.sd, entry.seeds, entry.df, ALPHA / len(tested))
        entry = entry.model_copy(update=changes)
        outcome, sentence = verdict(entry, metrics[entry.metric])
        judged.append(entry.model_copy(update={"outcome": outcome, "verdict": sentence}))
    return judged


def _tested(entry: Difference, metric: Metric) -> float | None:
    """p of the hypothesis that the difference is at most what its L0 alone could make; of no difference at equal L0."""
    if entry.p is None or not entry.l0_allowance or not entry.sd or not entry.df or entry.difference is None:
        return entry.p
    if dominated(entry, metric):
        return entry.p
    beyond = (abs(entry.difference) - entry.l0_allowance) / (entry.sd / math.sqrt(entry.seeds))
    return float(min(1.0, 2 * stats.t.sf(beyond, entry.df)))
