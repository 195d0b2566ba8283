"""Compares two studies: their settings, and the arms and metrics that both have.

Differences between arms, taken within each study, can always be compared; levels only where both have the same store.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import JsonValue

from pipeline.artefacts.storage import Storage, open_storage
from pipeline.errors import BadInputError
from pipeline.report.columns import Metric, by_arm, mean
from pipeline.report.metrics import compared
from pipeline.report.page import as_csv, as_json, environment
from pipeline.report.record import Frozen
from pipeline.report.results import Results
from pipeline.report.tables import interval


class Line(Frozen):
    """An arm in one metric, in both studies. The fields but for the last are the columns of comparison.csv."""

    metric: str
    arm: str
    layer_a: int
    layer_b: int
    mean_a: float | None
    mean_b: float | None
    seeds_a: int
    seeds_b: int
    level_difference: float | None
    reference: str | None
    """The arm that `arm` changes. Then come each study's own differences to it, with 95 % intervals."""
    difference_a: float | None
    low_a: float | None
    high_a: float | None
    difference_b: float | None
    low_b: float | None
    high_b: float | None
    planned: bool


COLUMNS = [name for name in Line.model_fields if name != "planned"]


class Setting(Frozen):
    """A setting of both studies."""

    name: str
    a: JsonValue
    b: JsonValue
    same: bool


class Comparison(Frozen):
    """Two studies side by side; the content of comparison.json."""

    a: str
    b: str
    same_store: bool
    same_model: bool
    is_demo: bool
    """True if one of the two is; so too for `is_synthetic`."""
    is_synthetic: bool
    settings: tuple[Setting, ...]
    """Those that differ first."""
    layers: tuple[tuple[int, int], ...]
    """The layers of both that stand beside each other."""
    only_a: tuple[str, ...]
    """Arms that only the first study has."""
    only_b: tuple[str, ...]
    lines: tuple[Line, ...]


def compare(a: Results, b: Results) -> Comparison:
    """A line for every shared layer, arm and metric. Raises BadInputError when two studies have none in common."""
    arms_a, arms_b = ([arm.arm for arm in results.arms] for results in (a, b))
    arms = [arm for arm in arms_a if arm in arms_b]
    metrics = _shared_metrics(a, b)
    if not arms or not metrics:
        what = "arm" if not arms else "metric"
        raise BadInputError(f"{a.experiment} and {b.experiment} have no {what} in common; compare two that share one")
    layers = _layers(a, b)
    return Comparison(
        a=a.experiment,
        b=b.experiment,
        same_store=a.store.key == b.store.key,
        same_model=a.model == b.model,
        is_demo=a.is_demo or b.is_demo,
        is_synthetic=a.is_synthetic or b.is_synthetic,
        settings=tuple(_settings(a, b)),
        layers=tuple(layers),
        only_a=tuple(arm for arm in arms_a if arm not in arms),
        only_b=tuple(arm for arm in arms_b if arm not in arms),
        lines=tuple(_line(a, b, pair, arm, metric) for pair in layers for metric in metrics for arm in arms),
    )


def write_comparison(a: Results, b: Results, place: Path | Storage) -> str:
    """Write index.html, comparison.json and comparison.csv to a place; returns where the page is."""
    comparison = compare(a, b)
    storage = open_storage(place)
    storage.write("comparison.json", as_json(comparison))
    lines = ([getattr(line, name) for name in COLUMNS] for line in comparison.lines)
    storage.write("comparison.csv", as_csv(COLUMNS, lines))
    tables = _tables(comparison, _shared_metrics(a, b))
    html = environment().get_template("versus.html.j2").render(dict(comparison), tables=tables)
    storage.write("index.html", html.encode())
    return f"{storage}/index.html"


def _shared_metrics(a: Results, b: Results) -> list[Metric]:
    names = {metric.name for metric in compared(b)}
    return [metric for metric in compared(a) if metric.name in names]


def _layers(a: Results, b: Results) -> list[tuple[int, int]]:
    """The layers that stand beside each other: the shared ones; if none is shared, the first of both, the second ..."""
    shared = [(layer, layer) for layer in a.layers if layer in b.layers]
    return shared or list(zip(a.layers, b.layers, strict=False))


def _line(a: Results, b: Results, layers: tuple[int, int], arm: str, metric: Metric) -> Line:
    base = next(entry.base for entry in a.arms if entry.arm == arm)
    values: list[list[float]] = []
    fields: dict[str, Any] = {}
    for name, results, layer in zip("ab", (a, b), layers, strict=True):
        found = by_arm(results.of_layer(layer), metric).get(arm, [])
        own = [entry for entry in results.differences if (entry.layer, entry.metric) == (layer, metric.name)]
        own = [entry for entry in own if (entry.arm, entry.reference) == (arm, base)]
        values.append(found)
        fields |= {f"layer_{name}": layer, f"mean_{name}": mean(found) if found else None, f"seeds_{name}": len(found)}
        fields |= {f"{field}_{name}": getattr(own[0], field) if own else None for field in ("difference", "low", "high")}
    return Line(
        metric=metric.name,
        arm=arm,
        reference=base,
        planned=metric.planned is not None,
        level_difference=mean(values[1]) - mean(values[0]) if all(values) else None,
        **fields,
    )


def _settings(a: Results, b: Results) -> list[Setting]:
    """Every setting of both studies, those that differ first."""
    of_a, of_b = dict(_described(a)), dict(_described(b))
    pairs = [(name, of_a.get(name), of_b.get(name)) for name in {**of_a, **of_b}]
    settings = [Setting(name=name, a=one, b=other, same=one == other) for name, one, other in pairs]
    return sorted(settings, key=lambda setting: setting.same)


def _described(results: Results) -> Iterator[tuple[str, JsonValue]]:
    """The settings of a study by name."""
    yield "model", results.model.name
    yield from ((f"model: {name}", value) for name, value in results.model.facts.items())
    store = results.store.model_dump(mode="json", exclude={"seconds", "bytes"})
    yield from ((f"store: {name}", value) for name, value in store.items())
    yield "probing tasks", [task.name for task in results.tasks]
    yield "seeds", [*results.seeds]
    yield "layers", [*results.layers]
    recipe: dict[str, JsonValue] = results.training.model_dump(mode="json")
    for name, value in recipe.items():
        section = value if isinstance(value, dict) else {"": value}
        yield from ((f"recipe: {name} {inner}".rstrip(), inner_value) for inner, inner_value in section.items())


@dataclass(frozen=True)
class Effect:
    """A study's own difference between an arm and the one it changes, and its interval."""

    difference: str
    interval: str | None


@dataclass(frozen=True)
class TableLine:
    """A `Line`, written out."""

    arm: str
    reference: str | None
    means: list[str | None]
    change: str | None
    effects: list[Effect | None]


@dataclass(frozen=True)
class Table:
    """One metric at one pair of layers."""

    heading: str
    planned: bool
    layers: str
    rows: list[TableLine]


def _tables(comparison: Comparison, metrics: Sequence[Metric]) -> list[Table]:
    """One table for each pair of layers and metric, the planned metrics first."""
    tables: list[Table] = []
    for layer_a, layer_b in comparison.layers:
        layers = f"layer {layer_a}" if layer_a == layer_b else f"layer {layer_a} beside layer {layer_b}"
        for metric in sorted(metrics, key=lambda metric: metric.planned is None):
            lines = [line for line in comparison.lines if (line.layer_a, line.metric) == (layer_a, metric.name)]
            rows = [_table_line(line, metric) for line in lines]
            heading = metric.planned.heading if metric.planned else metric.name.replace("_", " ")
            tables.append(Table(heading, metric.planned is not None, layers, rows))
    return tables


def _table_line(line: Line, metric: Metric) -> TableLine:
    return TableLine(
        line.arm,
        line.reference,
        means=[None if value is None else metric.show(value) for value in (line.mean_a, line.mean_b)],
        change=metric.difference(line.level_difference),
        effects=[
            _effect(metric, line.difference_a, line.low_a, line.high_a),
            _effect(metric, line.difference_b, line.low_b, line.high_b),
        ],
    )


def _effect(metric: Metric, difference: float | None, low: float | None, high: float | None) -> Effect | None:
    shown = metric.difference(difference)
    return None if shown is None else Effect(shown, interval(metric, low, high))
