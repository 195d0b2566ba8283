"""The report of a study: one self-contained HTML page, and the same numbers as JSON and CSV."""

import csv
import json
from collections.abc import Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.filesize import decimal

from pipeline.artefacts.storage import Storage, open_storage
from pipeline.report import latent_plots, plots, tables, text
from pipeline.report.differences import COLUMNS, summary
from pipeline.report.drawing import as_image
from pipeline.report.metrics import F1, FOUND, ONE_TO_ONE, RECONSTRUCTED, RESETS, SILENT, TRUTH, Results, by_arm, pick

TEMPLATES = Path(__file__).parent / "templates"
SCALARS = ("arm", "seed", "layer", "sae", "steps", "tokens", "seconds", "degenerate")
LOSS = ("clean", "sae", "zero", "mean", "recovered_zero", "recovered_mean", "reason")
INTERFERENCE = [("own", "pairs"), ("own", "interference"), ("own", "co_activation")]
INTERFERENCE += [("fixed", name) for name in ("pairs", "interference", "co_activation", "same_direction")]
BPCR = ("row", "column", "union", "mutual", "chance", "random_tied", "lift", "kappa", "strength_weighted")
BPCR += ("permuted", "permuted_std", "phi_union", "phi_chance", "phi_lift", "phi_random_tied", "live", "pairs", "reason")


def write_report(results: Results, place: Path | Storage) -> str:
    """Write index.html and its numbers to a place, each file whole or not at all; returns where the page is.

    results.json has everything; results.csv a line per SAE, differences.csv a line per difference between two arms.
    Raises ValueError when `results` holds NaN or an infinity, which JSON cannot say.
    """
    storage = open_storage(place)
    data = json.dumps(dict(results), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    storage.write("results.json", data.encode())
    storage.write("results.csv", as_csv(_columns(results), results["rows"]).encode())
    storage.write("differences.csv", as_csv([(name,) for name in COLUMNS], results["differences"]).encode())
    storage.write("index.html", _html(results).encode())
    return f"{storage}/index.html"


def environment() -> Environment:
    """The templates of the report, which escape everything they are given."""
    found = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters = (text.count, decimal, text.duration, text.scalar, text.words, text.date, text.percent, text.significant)
    found.filters.update({function.__name__: function for function in filters})
    return found


def _columns(results: Results) -> list[tuple[str, ...]]:
    """The paths in a row that results.csv shows; a column's name is its path joined by `_`."""
    ks = [*map(str, results["k_values"]), "all"]
    tasks = [task["name"] for task in results["tasks"]]
    paths: list[tuple[str, ...]] = [(name,) for name in SCALARS]
    paths += [metric.path for metric in (*RECONSTRUCTED, RESETS)]
    paths += [(probing, k) for probing in ("sparse_probing", "llm_probing") for k in ks]
    paths += [("loss", name) for name in LOSS]
    paths += [("interference", *path) for path in INTERFERENCE]
    paths += [("bpcr", name) for name in BPCR]
    paths += [metric.path for metric in (FOUND, ONE_TO_ONE, F1, SILENT, *TRUTH)] if results["is_synthetic"] else []
    by_task = ("sparse_probing_by_task", "llm_probing_by_task")
    return paths + [(probing, task, k) for probing in by_task for task in tasks for k in ks]


def as_csv(paths: Iterable[tuple[str, ...]], rows: Iterable[Mapping[str, Any]]) -> str:
    """One line per row, the values at `paths`, whose joined names are the header; nulls are empty."""
    buffer, paths = StringIO(), list(paths)
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow("_".join(path) for path in paths)
    writer.writerows([pick(row, *path) for path in paths] for row in rows)
    return buffer.getvalue()


def _html(results: Results) -> str:
    rows = results["rows"]
    view = {
        "layers": [_layer(results, layer) for layer in sorted({row["layer"] for row in rows})],
        "seeds": sorted({row["seed"] for row in rows}),
        "per_seed": tables.per_seed(results),
    }
    return environment().get_template("index.html.j2").render(results, **view)


def comparison_image(results: Results, layer: int) -> str | None:
    """The planned differences of a layer as an SVG image of its own, in the page's light colours; None without any."""
    entries = [entry for entry in results["differences"] if entry["layer"] == layer and entry["planned"]]
    headings = {table["name"]: table["heading"] for table in tables.planned(results, entries)}
    plot = plots.forest("comparison", entries, headings, [arm["arm"] for arm in results["arms"]])
    return as_image(plot, (TEMPLATES / "style.css").read_text(encoding="utf-8")) if plot else None


def _layer(results: Results, layer: int) -> dict[str, Any]:
    """Everything the page shows of one layer."""
    rows = [row for row in results["rows"] if row["layer"] == layer]
    sound = {(row["arm"], row["seed"]) for row in rows if row["degenerate"] is None}
    curves = [curve for curve in results["curves"] if curve["layer"] == layer and (curve["arm"], curve["seed"]) in sound]
    entries = [entry for entry in results["differences"] if entry["layer"] == layer]
    arms = [arm["arm"] for arm in results["arms"]]
    planned = tables.planned(results, entries)
    headings = {table["name"]: table["heading"] for table in planned}
    return {
        "layer": layer,
        "groups": tables.groups(results),
        "model": tables.model_row(results, rows),
        "reported": tables.reported_rows(results, rows),
        "arms": [tables.arm_row(results, arm, [row for row in rows if row["arm"] == arm]) for arm in arms],
        "summary": summary(entries),
        "planned": planned,
        "exploratory": tables.exploratory(results, entries),
        "tasks": [tables.task(results, task, rows) for task in results["tasks"]],
        "examples": [example for example in results["examples"] if example["layer"] == layer],
        "not_drawn": [arm for arm in arms if arm not in by_arm(rows, "fvu")],
        "forest_plot": plots.forest(f"forest-{layer}", [entry for entry in entries if entry["planned"]], headings, arms),
        "probing_plot": plots.probing_by_k(f"probing-{layer}", rows, arms, results["k_values"]),
        "sparsity_plot": plots.fvu_against_l0(f"sparsity-{layer}", rows, arms),
        "curves_plot": plots.learning_curves(f"curves-{layer}", curves, arms),
        "capture_plot": latent_plots.pair_capture(f"capture-{layer}", rows, arms),
        "capture_curves_plot": latent_plots.capture_curves(f"capture-curves-{layer}", rows, arms),
        "histograms_plot": latent_plots.histograms(f"histograms-{layer}", rows, arms),
    }
