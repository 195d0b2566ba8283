"""Computes the differences between arms of one layer, how certain they are, and a verdict on each planned one.

Planned are the metrics that say so in their entry (`metrics.METRICS`), of every arm against the arm it changes
(`study.arms.Arm.base`). Every other difference is exploratory: it has an interval, but no verdict.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pipeline.report.columns import Caveat, Group, Metric, mean
from pipeline.report.metrics import L0, SAME_DIRECTION, compared
from pipeline.report.results import Difference, Results, Row
from pipeline.report.statistics import CONFIDENCE, holm, paired, seeds_needed
from pipeline.report.text import count, signed

REFERENCES = ("full", "no-contrast", "baseline")
"""Every arm is compared with these too, where the study has them."""
ALPHA = 1 - CONFIDENCE
L0_TOLERANCE = 0.05
"""Relative difference in L0 above which `Caveat.equal_l0` withholds a verdict."""
SAME_LATENT = 0.5
"""Mean cosine to the baseline's latents of the same index, below which `Caveat.same_latents` withholds a verdict."""

Pair = tuple[Row, Row]
"""The rows of two arms with the same seed: an arm's and its reference's."""


def differences(results: Results) -> list[Difference]:
    """One entry per layer, metric, reference and arm, in that order: arm minus reference, over the seeds both have."""
    found: list[Difference] = []
    bases = {arm.arm: arm.base for arm in results.arms if arm.question is not None}
    references = [arm for arm in bases if arm in REFERENCES or arm in bases.values()]
    metrics = compared(results)
    for layer in dict.fromkeys(row.layer for row in results.rows):
        rows = results.of_layer(layer)
        for metric in metrics:
            entries = [
                _difference(rows, metric, arm, reference, planned=_planned(metric, arm, reference, bases))
                for reference in references
                for arm in bases
                if arm != reference
            ]
            found += _judged(entries, metric)
    return found


def _planned(metric: Metric, arm: str, reference: str, bases: Mapping[str, str | None]) -> bool:
    plan = metric.planned
    return plan is not None and bases[arm] == reference and not {arm, reference} & set(plan.not_for)


def _difference(rows: Sequence[Row], metric: Metric, arm: str, reference: str, *, planned: bool) -> Difference:
    measured: list[Pair] = []
    changes: list[float] = []
    for ours, theirs in _pairs(rows, arm, reference):
        value, other = metric.of(ours), metric.of(theirs)
        if value is not None and other is not None:
            measured.append((ours, theirs))
            changes.append(value - other)
    found = paired(changes) if changes else None
    tasks = _tasks(measured, metric)
    return Difference(
        layer=rows[0].layer,
        metric=metric.name,
        arm=arm,
        reference=reference,
        planned=planned,
        better=metric.better,
        seeds=len(changes),
        difference=found and found.mean,
        sd=found and found.sd,
        low=found and found.low,
        high=found and found.high,
        p=found and found.p,
        bootstrap_low=found and found.bootstrap_low,
        bootstrap_high=found and found.bootstrap_high,
        l0_ratio=_l0_ratio(measured) if metric.caveat == Caveat.equal_l0 else None,
        same_direction=_same_direction(measured) if metric.caveat == Caveat.same_latents else None,
        tasks=len(tasks) or None,
        tasks_higher=sum(change > 0 for change in tasks) if tasks else None,
    )


def _pairs(rows: Sequence[Row], arm: str, reference: str) -> Iterator[Pair]:
    theirs = {row.seed: row for row in rows if row.arm == reference}
    return ((row, theirs[row.seed]) for row in rows if row.arm == arm and row.seed in theirs)


def _means(pairs: Sequence[Pair], metric: Metric) -> list[float]:
    """A metric's mean over the seeds, of the arm and of the reference; empty where a value is missing."""
    sides = [[metric.of(row) for row in side] for side in zip(*pairs, strict=True)]
    known = [[value for value in side if value is not None] for side in sides]
    return [mean(values) for values in known] if all(len(values) == len(pairs) for values in known) else []


def _l0_ratio(pairs: Sequence[Pair]) -> float | None:
    """Mean L0 of the arm over that of the reference."""
    if not pairs or not all(theirs.l0 for _, theirs in pairs):
        return None
    ours, theirs = _means(pairs, L0)
    return ours / theirs


def _same_direction(pairs: Sequence[Pair]) -> float | None:
    """Mean cosine to the baseline's latents of the same index, of the less similar of the two arms."""
    return min(_means(pairs, SAME_DIRECTION), default=None)


def _tasks(pairs: Sequence[Pair], metric: Metric) -> list[float]:
    """The difference in each probing task, mean over seeds; tasks are not resampled, see docs/method.md."""
    if metric.group != Group.probing:
        return []
    k = metric.path[-1]
    by_task: dict[str, list[float]] = {}
    for ours, theirs in pairs:
        for task, accuracies in (ours.sparse_probing_by_task or {}).items():
            by_task.setdefault(task, []).append(accuracies[k] - (theirs.sparse_probing_by_task or {})[task][k])
    return [mean(changes) for changes in by_task.values()]


def _judged(entries: Sequence[Difference], metric: Metric) -> list[Difference]:
    """The entries of one metric; the planned ones get p values corrected for their number, and verdicts."""
    tested = [entry.p for entry in entries if entry.planned and entry.p is not None]
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


def _verdict(entry: Difference, metric: Metric) -> str:
    if entry.seeds == 0 or entry.difference is None:
        return "Not measured in both arms."
    if entry.seeds == 1:
        return "One seed: nothing can be told."
    if entry.p is None or entry.p_holm is None:
        if entry.difference:
            return "The same difference in every seed: no spread to test it against."
        return "Exactly the same in every seed: the two arms never differed."
    if entry.p_holm >= ALPHA:
        return _not_told(entry, metric)
    direction = "higher" if entry.difference > 0 else "lower"
    if entry.l0_ratio is not None and abs(entry.l0_ratio - 1) > L0_TOLERANCE:
        change = signed(f"{100 * (entry.l0_ratio - 1):.0f}%")
        return f"{direction.capitalize()}, but at another L0 ({change}): which of the two is better, this does not tell."
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
