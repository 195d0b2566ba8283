"""Two studies side by side: their settings, the arms and metrics that both have, and what each makes of its arms.

A study's own differences between arms can be compared with another study's; levels only where both rest on the same store.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.artefacts.storage import Storage, open_storage
from pipeline.errors import BadInputError
from pipeline.report import text
from pipeline.report.differences import PLANNED, compared_metrics
from pipeline.report.metrics import Metric, Results, Rows, by_arm, mean
from pipeline.report.page import as_csv, environment

COLUMNS = (
    "metric", "arm", "layer_a", "layer_b", "mean_a", "mean_b", "seeds_a", "seeds_b", "level_difference", "reference",
    "difference_a", "low_a", "high_a", "difference_b", "low_b", "high_b",
)  # fmt: skip


def compare(a: Results, b: Results) -> dict[str, Any]:
    """What two studies have in common, as plain data: a line for every shared layer, arm and metric.

    Raises BadInputError when it is nothing.
    """
    arms = [arm["arm"] for arm in a["arms"] if arm["arm"] in {other["arm"] for other in b["arms"]}]
    metrics = [metric for metric in compared_metrics(a) if metric in compared_metrics(b)]
    if not arms or not metrics:
        what = "arm" if not arms else "metric"
        raise BadInputError(f"{a['experiment']} and {b['experiment']} have no {what} in common, there is nothing to compare")
    lines = [_line(a, b, layers, arm, metric) for layers in _layers(a, b) for metric in metrics for arm in arms]
    return {
        "a": a["experiment"],
        "b": b["experiment"],
        "same_store": a["store"]["key"] == b["store"]["key"],
        "same_model": a["model"] == b["model"],
        "is_demo": a["is_demo"] or b["is_demo"],
        "is_synthetic": a["is_synthetic"] or b["is_synthetic"],
        "settings": _settings(a, b),
        "layers": [list(layers) for layers in _layers(a, b)],
        "only_a": [arm["arm"] for arm in a["arms"] if arm["arm"] not in arms],
        "only_b": [arm["arm"] for arm in b["arms"] if arm["arm"] not in arms],
        "lines": lines,
    }


def write_comparison(a: Results, b: Results, place: Path | Storage) -> str:
    """Write index.html, comparison.json and comparison.csv to a place; returns where the page is."""
    comparison = compare(a, b)
    storage = open_storage(place)
    data = json.dumps(comparison, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    storage.write("comparison.json", data.encode())
    storage.write("comparison.csv", as_csv([(name,) for name in COLUMNS], comparison["lines"]).encode())
    tables = _tables(comparison, {metric.name: metric for metric in compared_metrics(a)})
    html = environment().get_template("versus.html.j2").render(comparison, tables=tables)
    storage.write("index.html", html.encode())
    return f"{storage}/index.html"


def _layers(a: Results, b: Results) -> list[tuple[int, int]]:
    """The layers that are set beside each other: the shared ones; of studies that share none, in their order."""
    of_a, of_b = (sorted({row["layer"] for row in results["rows"]}) for results in (a, b))
    shared = [(layer, layer) for layer in of_a if layer in of_b]
    return shared or list(zip(of_a, of_b, strict=False))


def _line(a: Results, b: Results, layers: tuple[int, int], arm: str, metric: Metric) -> dict[str, Any]:
    values = [
        by_arm(_at(results["rows"], layer), *metric.path).get(arm, []) for results, layer in zip((a, b), layers, strict=True)
    ]
    means = [mean(found) if found else None for found in values]
    base = next(entry["base"] for entry in a["arms"] if entry["arm"] == arm)
    line: dict[str, Any] = {
        "metric": metric.name,
        "arm": arm,
        "reference": base,
        "planned": any(plan.metric == metric.name for plan in PLANNED),
        "level_difference": mean(values[1]) - mean(values[0]) if all(values) else None,
    }
    for name, results, layer, value, found in zip("ab", (a, b), layers, means, values, strict=True):
        own = next(
            (
                entry
                for entry in _at(results["differences"], layer)
                if (entry["metric"], entry["arm"], entry["reference"]) == (metric.name, arm, base)
            ),
            {},
        )
        line |= {f"layer_{name}": layer, f"mean_{name}": value, f"seeds_{name}": len(found)}
        line |= {f"{field}_{name}": own.get(field) for field in ("difference", "low", "high")}
    return line


def _at(rows: Rows, layer: int) -> list[Any]:
    return [row for row in rows if row["layer"] == layer]


def _settings(a: Results, b: Results) -> list[dict[str, Any]]:
    """Every setting of both studies, those that differ first."""
    described = [dict(_described(results)) for results in (a, b)]
    names = dict.fromkeys([*described[0], *described[1]])
    settings = [{"name": name, "a": described[0].get(name), "b": described[1].get(name)} for name in names]
    for setting in settings:
        setting["same"] = setting["a"] == setting["b"]
    return sorted(settings, key=lambda setting: setting["same"])


def _described(results: Results) -> Iterable[tuple[str, Any]]:
    yield "model", results["model"]["name"]
    yield from ((f"model: {name}", value) for name, value in results["model"]["facts"].items())
    yield from ((f"store: {name}", value) for name, value in results["store"].items() if name not in ("seconds", "bytes"))
    yield "probing tasks", [task["name"] for task in results["tasks"]]
    yield "seeds", sorted({row["seed"] for row in results["rows"]})
    yield "layers", sorted({row["layer"] for row in results["rows"]})
    for name, value in results["training"].items():
        if isinstance(value, dict):
            yield from ((f"recipe: {name} {inner}", inner_value) for inner, inner_value in value.items())
        else:
            yield f"recipe: {name}", value


def _tables(comparison: dict[str, Any], metrics: dict[str, Metric]) -> list[dict[str, Any]]:
    """One table for each pair of layers and metric, the planned metrics first."""
    tables: list[dict[str, Any]] = []
    headings = {plan.metric: plan.heading for plan in PLANNED}
    for layer_a, layer_b in comparison["layers"]:
        for name in sorted(metrics, key=lambda name: name not in headings):
            show = metrics[name].show
            lines = [line for line in comparison["lines"] if (line["layer_a"], line["metric"]) == (layer_a, name)]
            rows = [
                {
                    "arm": line["arm"],
                    "reference": line["reference"],
                    "means": [None if line[key] is None else show(line[key]) for key in ("mean_a", "mean_b")],
                    "change": None if line["level_difference"] is None else text.signed(show(line["level_difference"])),
                    "effects": [_effect(line, study, metrics[name]) for study in "ab"],
                }
                for line in lines
            ]
            heading = headings.get(name, name.replace("_", " "))
            layers = f"layer {layer_a}" if layer_a == layer_b else f"layer {layer_a} beside layer {layer_b}"
            if rows:
                tables.append({"heading": heading, "planned": name in headings, "layers": layers, "rows": rows})
    return tables


def _effect(line: dict[str, Any], study: str, metric: Metric) -> tuple[str, str | None] | None:
    """A study's own difference between an arm and the one it changes, and its interval."""
    if line[f"difference_{study}"] is None:
        return None
    shown = [line[f"{field}_{study}"] for field in ("difference", "low", "high")]
    difference, low, high = (None if value is None else text.signed(metric.show(value)) for value in shown)
    assert difference is not None
    return difference, None if low is None else f"{low} to {high}"
