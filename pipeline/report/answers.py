"""Fills the first screen of the page: a word and a number for each planned comparison, and what could have been told."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from pipeline.report.columns import Metric
from pipeline.report.metrics import compared
from pipeline.report.results import Difference, Results
from pipeline.report.text import count
from pipeline.report.verdicts import is_significant


@dataclass(frozen=True)
class Answer:
    """What a planned comparison found: a word, its class in the style sheet, the difference, the whole verdict."""

    word: str
    kind: str
    difference: str | None
    verdict: str


@dataclass(frozen=True)
class Line:
    """An arm and the one it is compared with, in every planned metric; None where that was not measured."""

    arm: str
    reference: str
    cells: list[Answer | None]


@dataclass(frozen=True)
class AnswerTable:
    """The planned comparisons of a layer."""

    metrics: list[Metric]
    lines: list[Line]
    least: list[str | None]
    """For each metric the smallest difference that this study would have told, the median of its arms."""


def answers(results: Results, entries: Sequence[Difference]) -> AnswerTable | None:
    """The table of a layer; None where nothing was planned."""
    planned = [entry for entry in entries if entry.planned]
    names = {entry.metric for entry in planned if entry.seeds}
    metrics = [metric for metric in compared(results) if metric.name in names]
    if not planned:
        return None
    found = {(entry.arm, entry.reference, entry.metric): entry for entry in planned}
    pairs = compared_arms(results, planned)
    lines = [Line(arm, to, [_answer(found.get((arm, to, metric.name)), metric) for metric in metrics]) for arm, to in pairs]
    return AnswerTable(metrics, lines, [_least(planned, metric) for metric in metrics])


def compared_arms(results: Results, planned: Sequence[Difference]) -> list[tuple[str, str]]:
    """Each arm and the one that it is compared with, in the order of the study."""
    order = [arm.arm for arm in results.arms]
    return sorted(dict.fromkeys((entry.arm, entry.reference) for entry in planned), key=lambda pair: order.index(pair[0]))


def _answer(entry: Difference | None, metric: Metric) -> Answer | None:
    if entry is None or entry.difference is None or not entry.outcome or not entry.verdict:
        return None
    return Answer(entry.outcome, entry.outcome.replace(" ", "-"), metric.difference(entry.difference), entry.verdict)


def _least(planned: Sequence[Difference], metric: Metric) -> str | None:
    known = [entry.least for entry in planned if entry.metric == metric.name and entry.least is not None]
    return metric.show(median(known)) if known else None


def summary(entries: Sequence[Difference]) -> str:
    """What the planned comparisons of the page found, in a sentence or two."""
    planned = [entry for entry in entries if entry.planned]
    if not planned:
        return "No comparison was planned of the arms in this study."
    planned = [entry for entry in planned if entry.seeds] or planned  # not what this study cannot measure
    number = f"{count(len(planned))} planned comparisons" if len(planned) > 1 else "one planned comparison"
    seeds = max(entry.seeds for entry in planned)
    if seeds < 2:
        return f"None of the {number} can be decided: it takes at least two seeds of both arms."
    told = sum(map(is_significant, planned))
    equal = sum(entry.outcome == "equal" for entry in planned)
    also = f", and {count(equal)} {'is' if equal == 1 else 'are'} equal within what matters" if equal else ""
    return (
        f"Of the {number}, {count(told) if told else 'none'} can be told from seed noise{also}, at {seeds} seeds. "
        "Where nothing differs, and all arms vary about as much between seeds, at most 5 % of studies like this one tell of "
        "a difference."
    )
