"""What stands in the tables of the page: numbers written out, and the reason where there is none."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from pipeline.report.differences import PLANNED, compared_metrics
from pipeline.report.metrics import (
    CAPTURE,
    CHANCE,
    DEAD,
    EFFORT,
    F1,
    FOUND,
    FVU,
    GEOMETRY,
    INTERFERENCE,
    L0,
    ONE_TO_ONE,
    RANDOM,
    REBUILDS,
    RECONSTRUCTED,
    RECOVERED,
    SILENT,
    TRUTH,
    UNION,
    Metric,
    Results,
    Rows,
    by_arm,
    mean,
    measured,
    pick,
    probe_sizes,
    probing,
)
from pipeline.report.text import p_value, signed, three

Group = tuple[str, list[Metric]]
"""Columns of a table under a common heading."""


class Cell(NamedTuple):
    """What stands in a table: a number and its spread, or over `span` columns the reason why there is none."""

    text: str | None
    spread: str | None = None
    span: int | None = None


def groups(results: Results) -> list[Group]:
    """The columns of the main table, those left out that no SAE of the study has."""
    accuracies = probing(results)
    found = [
        ("Reconstruction", [FVU, L0, RECOVERED, DEAD]),
        ("Sparse probing accuracy with k latents", accuracies),
        ("True features", [FOUND, ONE_TO_ONE, F1, SILENT]),
        ("Pairs", [INTERFERENCE]),
        ("Pair capture (BPCR)", [UNION, CHANCE, RANDOM]),
    ]
    kept = [(name, measured(results["rows"], metrics)) for name, metrics in found]
    return [(name, metrics) for name, metrics in kept if metrics] or [found[0]]


def arm_row(results: Results, arm: str, rows: Rows) -> dict[str, Any]:
    """One arm's cells: mean over the seeds and half their range; or, for a whole arm or group, why there are none."""
    failed = [row for row in rows if row["degenerate"] is not None]
    columns_of = groups(results)
    row: dict[str, Any] = {"arm": arm, "note": None, "cells": []}
    if not rows or len(failed) == len(rows):
        reasons = dict.fromkeys(entry["degenerate"] for entry in failed)
        text = f"degenerate: {'; '.join(reasons)}" if rows else "not evaluated yet"
        return row | {"cells": [Cell(text, span=sum(len(columns) for _, columns in columns_of))]}
    if failed:
        row["note"] = "; ".join(f"without seed {entry['seed']}, degenerate: {entry['degenerate']}" for entry in failed)
    for _, columns in columns_of:
        values = [(column, by_arm(rows, *column.path).get(arm, [])) for column in columns]
        reasons = by_arm(rows, "bpcr", "reason").get(arm, [])
        if columns[0] == UNION and not values[0][1] and reasons:
            row["cells"].append(Cell(f"not measured: {reasons[0]}", span=len(columns)))
            continue
        row["cells"] += [_cell(column, found) for column, found in values]
    return row


def _cell(column: Metric, values: Sequence[float]) -> Cell:
    if not values:
        return Cell(None)
    spread = f"±{column.show((max(values) - min(values)) / 2)}" if len(values) > 1 else None
    return Cell(column.show(mean(values)), spread)


def model_row(results: Results, rows: Rows) -> list[str | None]:
    """The language model's own probing accuracy, under the columns of `groups`."""
    return _under(results, _first(rows, "llm_probing"))


def reported_rows(results: Results, rows: Rows) -> list[tuple[str, list[str | None]]]:
    """The model's accuracies by number of latents, those that the method's log reports for it, and the differences."""
    reported = results["reported_llm_probing"]
    ours = _first(rows, "llm_probing")
    if not reported or not ours:
        return []
    ks = probe_sizes(results)
    known = {k: ours[k] - reported[k] for k in ks if k in ours and k in reported}
    return [
        ("measured here", [three(ours[k]) if k in ours else None for k in ks]),
        ("reported", [three(reported[k]) if k in reported else None for k in ks]),
        ("difference", [signed(three(known[k])) if k in known else None for k in ks]),
    ]


def _under(results: Results, accuracies: Mapping[str, float]) -> list[str | None]:
    columns = [column for _, group in groups(results) for column in group]
    values = [accuracies.get(column.path[1]) if column.path[0] == "sparse_probing" else None for column in columns]
    return [None if value is None else three(value) for value in values]


def _first(rows: Rows, field: str) -> dict[str, float]:
    return next((row[field] for row in rows if row[field]), {})


def planned(results: Results, entries: Rows) -> list[dict[str, Any]]:
    """One table for each planned metric of the study: the differences of a layer with intervals and verdicts."""
    metrics = {metric.name: metric for metric in compared_metrics(results)}
    tables: list[dict[str, Any]] = []
    for plan in PLANNED:
        found = [entry for entry in entries if entry["planned"] and entry["metric"] == plan.metric]
        if found:
            metric = metrics[plan.metric]
            lines = [_difference(entry, metric) for entry in found]
            tables.append({"heading": plan.heading, "better": metric.better, "name": plan.metric, "rows": lines})
    return tables


def exploratory(results: Results, entries: Rows) -> list[dict[str, Any]]:
    """One table for each reference: all differences to it, with their intervals."""
    metrics = compared_metrics(results)
    tables: list[dict[str, Any]] = []
    for reference in dict.fromkeys(entry["reference"] for entry in entries):
        against = {(entry["arm"], entry["metric"]): entry for entry in entries if entry["reference"] == reference}
        rows = [
            {"arm": arm, "cells": [_difference(against[arm, metric.name], metric) for metric in metrics]}
            for arm in dict.fromkeys(arm for arm, _ in against)
        ]
        tables.append({"reference": reference, "columns": metrics, "rows": rows})
    return tables


def _difference(entry: Mapping[str, Any], metric: Metric) -> dict[str, Any]:
    def change(value: float | None) -> str | None:
        return None if value is None else signed(metric.show(value))

    interval = None if entry["low"] is None else f"{change(entry['low'])} to {change(entry['high'])}"
    resampled = None
    if entry["bootstrap_low"] is not None:
        resampled = f"{change(entry['bootstrap_low'])} to {change(entry['bootstrap_high'])}"
    tasks = None if entry["tasks"] is None else f"{entry['tasks_higher']} of {entry['tasks']}"
    return {
        "arm": entry["arm"],
        "reference": entry["reference"],
        "difference": change(entry["difference"]),
        "interval": interval,
        "bootstrap": resampled,
        "seeds": entry["seeds"],
        "p": None if entry["p_holm"] is None else p_value(entry["p_holm"]),
        "tasks": tasks,
        "verdict": entry["verdict"],
    }


def task(results: Results, task: Mapping[str, Any], rows: Rows) -> dict[str, Any]:
    """Accuracy of every arm on one probing task, mean over seeds."""
    name, ks = task["name"], probe_sizes(results)

    def accuracies(kind: str, arm: str | None) -> list[str | None]:
        some = [row for row in rows if arm is None or row["arm"] == arm]
        found = [[pick(row, kind, name, k) for row in some] for k in ks]
        known = [[value for value in values if value is not None] for values in found]
        return [three(mean(values)) if values else None for values in known]

    arms = [(arm["arm"], accuracies("sparse_probing_by_task", arm["arm"])) for arm in results["arms"]]
    return {"task": task, "ks": ks, "model": accuracies("llm_probing_by_task", None), "arms": arms}


def per_seed(results: Results) -> dict[str, Any]:
    """Every row by itself, with the metrics that the main table leaves out."""
    columns = [column for _, group in groups(results) for column in group]
    columns += measured(results["rows"], [*REBUILDS, *RECONSTRUCTED, *TRUTH, *GEOMETRY, *CAPTURE, *EFFORT])
    columns = list(dict.fromkeys(columns))
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
