"""The report of a study: one self-contained HTML page, and the same numbers as JSON and CSV."""

import csv
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.report import plots
from pipeline.report.plots import Rows, by_arm, mean, pick
from pipeline.storage import Storage, open_storage

Results = Mapping[str, Any]
"""What a report shows, as plain JSON data. `rows` holds one entry per arm, seed and layer."""

SCALARS = ("arm", "seed", "layer", "sae", "steps", "tokens", "seconds", "degenerate")
METRICS = ("fvu", "cosine", "l0", "dead_fraction", "max_decoder_cosine", "resets")
BPCR = ("row", "column", "union", "mutual", "chance", "random_tied", "lift", "kappa", "live", "pairs", "reason")


class Column(NamedTuple):
    """One metric of a table: where a row holds it, its heading, its entry in the glossary and how it is written."""

    path: tuple[str, ...]
    heading: str
    term: str
    show: Callable[[float], str]


class Cell(NamedTuple):
    """What stands in a table: a number and its spread, or over `span` columns the reason why there is none."""

    text: str | None
    spread: str | None = None
    span: int | None = None


def write_report(results: Results, place: Path | Storage) -> str:
    """Write index.html, results.json and results.csv to a place, each whole or not at all; returns where the page is.

    Raises ValueError when `results` holds NaN or an infinity, which JSON cannot say.
    """
    storage = open_storage(place)
    data = json.dumps(dict(results), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    storage.write("results.json", data.encode())
    storage.write("results.csv", _csv(results).encode())
    storage.write("index.html", _html(results).encode())
    return f"{storage}/index.html"


def _csv(results: Results) -> str:
    """One line per row; a column's name is its path in the row joined by `_`, and nulls are empty."""
    ks = _ks(results)
    tasks = [task["name"] for task in results["tasks"]]
    paths: list[tuple[str, ...]] = [(name,) for name in SCALARS + METRICS]
    paths += [(probing, k) for probing in ("sparse_probing", "llm_probing") for k in ks]
    paths += [("bpcr", name) for name in BPCR]
    by_task = ("sparse_probing_by_task", "llm_probing_by_task")
    paths += [(probing, task, k) for probing in by_task for task in tasks for k in ks]
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow("_".join(path) for path in paths)
    writer.writerows([pick(row, *path) for path in paths] for row in results["rows"])
    return text.getvalue()


def _html(results: Results) -> str:
    templates = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(
        loader=templates, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(count=_count, size=_size, duration=_duration, scalar=_scalar, words=_words, date=_date)
    rows: Rows = results["rows"]
    view = {
        "layers": [_layer(results, layer) for layer in sorted({row["layer"] for row in rows})],
        "seeds": sorted({row["seed"] for row in rows}),
        "per_seed": _per_seed(results),
    }
    return environment.get_template("index.html.j2").render(results, **view)


def _layer(results: Results, layer: int) -> dict[str, Any]:
    """Everything the page shows of one layer."""
    rows = [row for row in results["rows"] if row["layer"] == layer]
    sound = {(row["arm"], row["seed"]) for row in rows if row["degenerate"] is None}
    curves = [curve for curve in results["curves"] if curve["layer"] == layer and (curve["arm"], curve["seed"]) in sound]
    arms = [arm["arm"] for arm in results["arms"]]
    return {
        "layer": layer,
        "groups": _groups(results),
        "model": _model_row(results, rows),
        "arms": [_arm_row(results, arm, [row for row in rows if row["arm"] == arm]) for arm in arms],
        "spreads": _spreads(results, rows),
        "tasks": [_task(results, task, rows) for task in results["tasks"]],
        "not_drawn": [arm for arm in arms if arm not in by_arm(rows, "fvu")],
        "probing_plot": plots.probing_by_k(f"probing-{layer}", rows, arms, results["k_values"]),
        "sparsity_plot": plots.fvu_against_l0(f"sparsity-{layer}", rows, arms),
        "curves_plot": plots.learning_curves(f"curves-{layer}", curves, arms),
        "capture_plot": plots.pair_capture(f"capture-{layer}", rows, arms),
    }


def _groups(results: Results) -> list[tuple[str, list[Column]]]:
    """The columns of the main table, in groups; those of probing only where there are tasks."""
    probing = [Column(("sparse_probing", k), k, "probing", _three) for k in _ks(results)]
    probing[0] = probing[0]._replace(heading=f"k = {probing[0].heading}")
    groups = [
        (
            "Reconstruction",
            [
                Column(("fvu",), "FVU", "fvu", _three),
                Column(("l0",), "L0", "l0", _one),
                Column(("dead_fraction",), "dead", "dead", _percent),
                Column(("resets",), "resets", "resets", _count),
            ],
        ),
        ("Sparse probing accuracy with k latents", probing),
        (
            "Pair capture (BPCR)",
            [
                Column(("bpcr", "union"), "union", "bpcr", _three),
                Column(("bpcr", "chance"), "chance", "chance", _three),
                Column(("bpcr", "random_tied"), "random", "random", _three),
            ],
        ),
    ]
    return [group for group in groups if results["tasks"] or group[1] is not probing]


def _arm_row(results: Results, arm: str, rows: Rows) -> dict[str, Any]:
    """One arm's cells: mean over the seeds and half their range; or, for a whole arm or group, why there are none."""
    failed = [row for row in rows if row["degenerate"] is not None]
    groups = _groups(results)
    row: dict[str, Any] = {"arm": arm, "note": None, "cells": []}
    if not rows or len(failed) == len(rows):
        reasons = dict.fromkeys(entry["degenerate"] for entry in failed)
        text = f"degenerate: {'; '.join(reasons)}" if rows else "not evaluated yet"
        return row | {"cells": [Cell(text, span=sum(len(columns) for _, columns in groups))]}
    if failed:
        row["note"] = "; ".join(f"without seed {entry['seed']}, degenerate: {entry['degenerate']}" for entry in failed)
    for _, columns in groups:
        values = [(column, by_arm(rows, *column.path).get(arm, [])) for column in columns]
        reasons = by_arm(rows, "bpcr", "reason").get(arm, [])
        if columns[0].path == ("bpcr", "union") and not values[0][1] and reasons:
            row["cells"].append(Cell(f"not measured: {reasons[0]}", span=len(columns)))
            continue
        row["cells"] += [_cell(column, found) for column, found in values]
    return row


def _cell(column: Column, values: Sequence[float]) -> Cell:
    if not values:
        return Cell(None)
    spread = f"±{column.show(_half_range(values))}" if len(values) > 1 else None
    return Cell(column.show(mean(values)), spread)


def _model_row(results: Results, rows: Rows) -> list[str | None]:
    """The language model's own probing accuracy, under the columns of `_groups`."""
    cells: list[str | None] = []
    for _, columns in _groups(results):
        for column in columns:
            kind, *rest = column.path
            found = [pick(row, "llm_probing", *rest) for row in rows] if kind == "sparse_probing" else []
            value = next((value for value in found if value is not None), None)
            cells.append(None if value is None else column.show(value))
    return cells


def _spreads(results: Results, rows: Rows) -> list[dict[str, str]]:
    """How far apart the arms are, and how far apart the seeds of one arm are, in the metrics that rank nothing."""
    first = str(results["k_values"][0])
    columns = (
        Column(("fvu",), "FVU", "fvu", _three),
        Column(("l0",), "L0", "l0", _one),
        Column(("sparse_probing", first), f"accuracy at k = {first}", "probing", _three),
        Column(("sparse_probing", "all"), "accuracy with all latents", "probing", _three),
    )
    spreads: list[dict[str, str]] = []
    for column in columns:
        arms = by_arm(rows, *column.path).values()
        if not arms:
            continue
        means = [mean(values) for values in arms]
        spread = max(_half_range(values) for values in arms) if any(len(values) > 1 for values in arms) else None
        spreads.append(
            {
                "metric": column.heading,
                "lowest": column.show(min(means)),
                "highest": column.show(max(means)),
                "spread": "" if spread is None else column.show(spread),
            }
        )
    return spreads


def _task(results: Results, task: Mapping[str, Any], rows: Rows) -> dict[str, Any]:
    """Accuracy of every arm on one probing task, mean over seeds."""
    name = task["name"]

    def accuracies(kind: str, arm: str | None) -> list[str | None]:
        some = [row for row in rows if arm is None or row["arm"] == arm]
        found = [[pick(row, kind, name, k) for row in some] for k in _ks(results)]
        known = [[value for value in values if value is not None] for values in found]
        return [_three(mean(values)) if values else None for values in known]

    arms = [(arm["arm"], accuracies("sparse_probing_by_task", arm["arm"])) for arm in results["arms"]]
    return {"task": task, "ks": _ks(results), "model": accuracies("llm_probing_by_task", None), "arms": arms}


def _per_seed(results: Results) -> dict[str, Any]:
    """Every row by itself, with the metrics that the main table leaves out."""
    columns = [column for _, group in _groups(results) for column in group]
    columns[2:2] = [
        Column(("cosine",), "cosine", "cosine", _three),
        Column(("max_decoder_cosine",), "decoder cosine", "decoder-cosine", _three),
    ]
    columns += [
        Column(("bpcr", "row"), "row", "masks", _three),
        Column(("bpcr", "column"), "column", "masks", _three),
        Column(("bpcr", "mutual"), "mutual", "masks", _three),
        Column(("bpcr", "lift"), "lift", "lift", _two),
        Column(("bpcr", "kappa"), "kappa", "kappa", _three),
        Column(("bpcr", "live"), "live", "live", _count),
        Column(("bpcr", "pairs"), "pairs", "pairs", _count),
        Column(("tokens",), "tokens", "tokens", _count),
        Column(("seconds",), "seconds", "seconds", _one),
    ]
    rows = [
        {
            "arm": row["arm"],
            "seed": row["seed"],
            "layer": row["layer"],
            "note": row["degenerate"] or pick(row, "bpcr", "reason"),
            "cells": [None if (value := pick(row, *column.path)) is None else column.show(value) for column in columns],
        }
        for row in results["rows"]
    ]
    return {"columns": columns, "rows": rows}


def _ks(results: Results) -> list[str]:
    return [*map(str, results["k_values"]), "all"]


def _half_range(values: Sequence[float]) -> float:
    return (max(values) - min(values)) / 2


def _one(value: float) -> str:
    return f"{value:,.1f}"


def _two(value: float) -> str:
    return f"{value:.2f}"


def _three(value: float) -> str:
    return f"{value:.3f}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _size(value: float) -> str:
    """Bytes in the largest decimal unit of which there is at least one."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value /= 1000
        del units[0]
    return f"{value:,.0f} {units[0]}" if value >= 100 else f"{value:.1f} {units[0]}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _scalar(value: Any) -> str:
    """A free fact as the page writes it: integers with separators, other numbers to three digits."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return _count(value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _date(timestamp: str) -> str:
    moment = datetime.fromisoformat(timestamp).astimezone(UTC)
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"
