"""Fills the tables of the page: with numbers as text, or with the reason why there is none."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.report.capture_metrics import UNION
from pipeline.report.columns import HEADINGS, SUITE_HEADINGS, Column, Group, Metric, Term, by_arm, mean, standard_error
from pipeline.report.glossary import GENERAL
from pipeline.report.metrics import FVU, L0, columns, compared, measured
from pipeline.report.results import Accuracies, Difference, Results, Row, Task, model_accuracies
from pipeline.report.statistics import over_pairs
from pipeline.report.text import p_value, signed, three
from pipeline.study.saebench_section import SAEBENCH

Columns = list[tuple[str, list[Metric]]]
"""Metrics under common headings."""
Texts = list[str | None]
"""Cells of a line; None where there is no number."""


@dataclass(frozen=True)
class Cell:
    """A cell of a table: a number and its spread, or the reason why there is none, over `span` columns."""

    text: str | None
    spread: str | None = None
    span: int | None = None


@dataclass(frozen=True)
class ArmLine:
    """An arm's line in the main table, and why some of its seeds are missing."""

    arm: str
    cells: list[Cell]
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class DifferenceLine:
    """A difference, written out."""

    arm: str
    reference: str
    difference: str | None
    interval: str | None
    interpolation: str | None
    """How much of it depends on the form of the interpolation between L0."""
    seeds: int
    p: str | None
    tasks: str | None
    verdict: str | None


@dataclass(frozen=True)
class PlannedTable:
    """The planned differences in one metric."""

    metric: Metric
    heading: str
    rows: list[DifferenceLine]


@dataclass(frozen=True)
class StabilityLine:
    """What the seeds of an arm have in common."""

    arm: str
    seeds: int
    matched: str | None
    interval: str | None
    nearest: str | None
    reason: str | None


@dataclass(frozen=True)
class ExploratoryLine:
    """All differences of an arm to one reference."""

    arm: str
    cells: list[DifferenceLine]


@dataclass(frozen=True)
class ExploratoryTable:
    """All differences to one reference."""

    reference: str
    columns: list[Metric]
    rows: list[ExploratoryLine]


@dataclass(frozen=True)
class TaskTable:
    """Accuracies on one probing task by number of latents: the model's own, and a line for each arm."""

    task: Task
    ks: list[str]
    model: Texts
    arms: list[tuple[str, Texts]]


@dataclass(frozen=True)
class SeedLine:
    """One SAE by itself."""

    row: Row
    note: str | None
    cells: Texts


@dataclass(frozen=True)
class SeedsTable:
    """Every SAE by itself."""

    columns: list[Metric]
    rows: list[SeedLine]


def main_columns(results: Results) -> Columns:
    """The columns of the main table, without those that no SAE of the study has."""
    return _under(HEADINGS, [metric for metric in measured(results) if metric.group in HEADINGS] or [FVU, L0])


def suite_columns(results: Results) -> Columns:
    """The columns of the table of sae-bench's other evaluations; none in a study without them."""
    return _under(SUITE_HEADINGS, measured(results))


def _under(headings: Mapping[Group, str], metrics: Sequence[Metric]) -> Columns:
    found = [(heading, [metric for metric in metrics if metric.group == group]) for group, heading in headings.items()]
    return [(heading, group) for heading, group in found if group]


def reasons(rows: Sequence[Row]) -> list[str]:
    """Why an evaluation of sae-bench has no result, each once."""
    found = [(name, row.at((name, "reason"))) for name in SAEBENCH for row in rows]
    return list(dict.fromkeys(f"{name}: {reason}" for name, reason in found if reason))


def glossary(results: Results) -> list[Term]:
    """The terms of the page: general ones, then those of the study's metrics by group."""
    asked = {metric for _, metrics in suite_columns(results) for metric in metrics}
    metrics = [metric for metric in columns(results) if isinstance(metric, Metric)]
    metrics = [metric for metric in metrics if metric.group != Group.suite or metric in asked]
    metrics.sort(key=lambda metric: [*Group].index(metric.group))
    return list(dict.fromkeys([*GENERAL, *(metric.term for metric in metrics)]))


def arm_line(columns: Columns, arm: str, rows: Sequence[Row]) -> ArmLine:
    """One arm's cells: mean over the seeds and its standard error; of a whole arm or group the reason why there are none."""
    failed = [row for row in rows if row.degenerate is not None]
    if len(failed) == len(rows):
        reasons = dict.fromkeys(str(row.degenerate) for row in failed)
        text = f"degenerate: {'; '.join(reasons)}" if rows else "not evaluated yet"
        return ArmLine(arm, [Cell(text, span=sum(len(metrics) for _, metrics in columns))])
    cells: list[Cell] = []
    for _, metrics in columns:
        reasons = [row.bpcr.reason for row in rows if row.bpcr and row.bpcr.reason]
        if UNION in metrics and not by_arm(rows, UNION) and reasons:
            cells.append(Cell(f"not measured: {reasons[0]}", span=len(metrics)))
        else:
            cells += [_cell(metric, by_arm(rows, metric).get(arm, [])) for metric in metrics]
    notes = [f"without seed {row.seed}, degenerate: {row.degenerate}" for row in failed]
    return ArmLine(arm, cells, "; ".join(notes) or None)


def _cell(metric: Metric, values: Sequence[float]) -> Cell:
    if not values:
        return Cell(None)
    spread = f"±{metric.show(standard_error(values))}" if len(values) > 1 else None
    return Cell(metric.show(mean(values)), spread)


def model_line(results: Results, rows: Sequence[Row]) -> Texts:
    """The language model's own probing accuracy, under the main table's columns."""
    ours = model_accuracies(rows) or {}
    metrics = [metric for _, group in main_columns(results) for metric in group]
    return [_three(ours, metric.path[-1]) if metric.group == Group.probing else None for metric in metrics]


def reported_lines(results: Results, rows: Sequence[Row]) -> list[tuple[str, Texts]]:
    """The model's own accuracies: as measured, as the method's log reports them, and the differences."""
    reported, ours = results.reported_llm_probing, model_accuracies(rows)
    if not reported or not ours:
        return []
    ks = results.probe_sizes
    return [
        ("measured here", [_three(ours, k) for k in ks]),
        ("reported", [_three(reported, k) for k in ks]),
        ("difference", [signed(three(ours[k] - reported[k])) if k in ours and k in reported else None for k in ks]),
    ]


def _three(accuracies: Accuracies, k: str) -> str | None:
    return three(accuracies[k]) if k in accuracies else None


def planned(results: Results, entries: Sequence[Difference]) -> list[PlannedTable]:
    """One table for each planned metric of the study: the differences of a layer with intervals and verdicts."""
    tables: list[PlannedTable] = []
    for metric in compared(results):
        found = [entry for entry in entries if entry.planned and entry.metric == metric.name]
        if metric.planned and found:
            tables.append(PlannedTable(metric, metric.planned.heading, [_line(entry, metric) for entry in found]))
    return tables


def exploratory(results: Results, entries: Sequence[Difference]) -> list[ExploratoryTable]:
    """One table for each reference: all differences to it, with their intervals."""
    metrics = compared(results)
    tables: list[ExploratoryTable] = []
    for reference in dict.fromkeys(entry.reference for entry in entries):
        against = {(entry.arm, entry.metric): entry for entry in entries if entry.reference == reference}
        rows = [
            ExploratoryLine(arm, [_line(against[arm, metric.name], metric) for metric in metrics])
            for arm in dict.fromkeys(arm for arm, _ in against)
        ]
        tables.append(ExploratoryTable(reference, metrics, rows))
    return tables


def stability(arms: Sequence[str], rows: Sequence[Row]) -> list[StabilityLine]:
    """A line for each arm with several seeds: MCC with its interval, and the mean cosine to the nearest."""
    lines: list[StabilityLine] = []
    for arm in arms:
        of_arm = [row for row in rows if row.arm == arm]
        matched, nearest = (by_arm(of_arm, Column(("stability", name))).get(arm, []) for name in ("mcc", "mmcs"))
        if nearest:
            found = over_pairs(matched) if matched else None
            interval = None if found is None or found.high is None else f"{three(found.low or 0)} to {three(found.high)}"
            reason = next((row.stability.reason for row in of_arm if row.stability), None)
            mcc = three(found.mean) if found else None
            lines.append(StabilityLine(arm, len(nearest), mcc, interval, three(mean(nearest)), reason))
    return lines


def _line(entry: Difference, metric: Metric) -> DifferenceLine:
    return DifferenceLine(
        arm=entry.arm,
        reference=entry.reference,
        difference=metric.difference(entry.difference),
        interval=interval(metric, entry.low, entry.high),
        interpolation=None if entry.interpolation_error is None else metric.show(entry.interpolation_error),
        seeds=entry.seeds,
        p=None if entry.p_holm is None else p_value(entry.p_holm),
        tasks=None if entry.tasks is None else f"{entry.tasks_higher} of {entry.tasks}",
        verdict=entry.verdict,
    )


def interval(metric: Metric, low: float | None, high: float | None) -> str | None:
    """An interval of a difference; None without one."""
    return None if low is None else f"{metric.difference(low)} to {metric.difference(high)}"


def task(results: Results, task: Task, rows: Sequence[Row]) -> TaskTable:
    """Accuracy of every arm on one probing task, mean over seeds."""
    ks = results.probe_sizes

    def means(of_rows: Sequence[dict[str, Accuracies] | None]) -> Texts:
        found = [[by_task[task.name][k] for by_task in of_rows if by_task and k in by_task[task.name]] for k in ks]
        return [three(mean(values)) if values else None for values in found]

    arms = [(arm.arm, means([row.sparse_probing_by_task for row in rows if row.arm == arm.arm])) for arm in results.arms]
    return TaskTable(task, ks, means([row.llm_probing_by_task for row in rows]), arms)


def per_seed(results: Results) -> SeedsTable:
    """Every SAE by itself, with the metrics that the main table leaves out."""
    metrics = [metric for _, group in main_columns(results) for metric in group]
    metrics += [metric for metric in measured(results) if metric.group not in HEADINGS]
    rows: list[SeedLine] = []
    for row in results.rows:
        values = [(metric, metric.of(row)) for metric in metrics]
        cells = [None if value is None else metric.show(value) for metric, value in values]
        rows.append(SeedLine(row, row.degenerate or (row.bpcr.reason if row.bpcr else None), cells))
    return SeedsTable(metrics, rows)
