"""Writes the report of a study: one self-contained HTML page, and the same numbers as JSON and CSV."""

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel
from rich.filesize import decimal

from pipeline.artefacts.storage import Storage, open_storage
from pipeline.report import latent_plots, plots, tables, text
from pipeline.report.answers import AnswerTable, answers, summary
from pipeline.report.browser import browser
from pipeline.report.columns import by_arm
from pipeline.report.drawing import as_image
from pipeline.report.findings import findings
from pipeline.report.glossary import MATRYOSHKA
from pipeline.report.latents import ExamplesOf
from pipeline.report.metrics import FVU, columns, measured
from pipeline.report.pareto import against_l0
from pipeline.report.results import Difference, Results
from pipeline.report.separated_pairs import SeparatedPart, separated_pairs
from pipeline.study.penalties import PENALTIES
from pipeline.study.reports import PAGE, publish_report

TEMPLATES = Path(__file__).parent / "templates"


def write_report(results: Results, place: Path | Storage) -> str:
    """Write index.html and its numbers to a place, and at last its manifest; returns where the page is.

    results.json has everything; results.csv a line per SAE, differences.csv a line per difference between two arms,
    findings.md what was found in sentences to quote.
    Raises ValueError when `results` holds NaN or an infinity, which JSON cannot express.
    """
    storage = open_storage(place)
    data = as_json(results)
    shown = columns(results)
    differences = ([getattr(entry, name) for name in Difference.model_fields] for entry in results.differences)
    files = {
        "results.json": data,
        "results.csv": as_csv([one.name for one in shown], ([one.of(row) for one in shown] for row in results.rows)),
        "differences.csv": as_csv(list(Difference.model_fields), differences),
        "findings.md": findings(results).encode(),
        PAGE: _html(results).encode(),
    }
    publish_report(storage, files, results.made_of)
    return f"{storage}/{PAGE}"


def environment() -> Environment:
    """The templates of the report, which escape everything they are given."""
    found = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    filters = (text.count, decimal, text.duration, text.scalar, text.words, text.date, text.percent, text.significant)
    found.filters.update({function.__name__: function for function in filters})
    return found


def as_json(data: BaseModel) -> bytes:
    """Data as a JSON file. Raises ValueError for NaN and infinities."""
    return (json.dumps(data.model_dump(), indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()


def as_csv(header: Sequence[str], lines: Iterable[Sequence[Any]]) -> bytes:
    """A header and lines as a CSV file; None is an empty cell."""
    buffer = StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(lines)
    return buffer.getvalue().encode()


def comparison_image(results: Results, layer: int) -> str | None:
    """The planned differences of a layer as an SVG image of its own, in the page's light colours; None without any."""
    plot = _forest("comparison", results, [entry for entry in results.differences if entry.layer == layer])
    return as_image(plot, (TEMPLATES / "style.css").read_text(encoding="utf-8")) if plot else None


def _forest(name: str, results: Results, entries: Sequence[Difference]) -> Markup | None:
    planned = [entry for entry in entries if entry.planned]
    headings = {table.metric.name: table.heading for table in tables.planned(results, planned)}
    return plots.forest(name, planned, headings, [arm.arm for arm in results.arms])


@dataclass(frozen=True, kw_only=True)
class Layer:
    """Everything that the page shows of one layer."""

    layer: int
    columns: tables.Columns
    model: tables.Texts
    reported: list[tuple[str, tables.Texts]]
    arms: list[tables.ArmLine]
    suite_columns: tables.Columns
    suite: list[tables.ArmLine]
    """sae-bench's other evaluations."""
    reasons: list[str]
    """Why some of these have no result."""
    stability: list[tables.StabilityLine]
    answers: AnswerTable | None
    planned: list[tables.PlannedTable]
    exploratory: list[tables.ExploratoryTable]
    tasks: list[tables.TaskTable]
    separated: SeparatedPart | None
    examples: list[ExamplesOf]
    not_drawn: list[str]
    """Arms without a sound SAE."""
    plots: dict[str, Markup | None]


def _html(results: Results) -> str:
    view = {
        "layers": [_layer(results, layer) for layer in results.layers],
        "seeds": results.seeds,
        "per_seed": tables.per_seed(results),
        "glossary": tables.glossary(results),
        "kinds": _kinds(results),
        "levels": results.levels,
        "shown_level": results.shown_level,
        "filters": _filters(results),
        "claims": _claims(results),
        "browser": browser(results.rows),
        "summary": summary(results.differences),
    }
    return environment().get_template("index.html.j2").render(dict(results), **view)


@dataclass(frozen=True, kw_only=True)
class Filter:
    """A box that shows or hides the arms of one backbone or penalty."""

    kind: Literal["backbone", "penalty"]
    value: str
    anchor: str


def _kinds(results: Results) -> dict[str, tuple[str, str]]:
    """Backbone and penalty of each arm; empty for an ablation of one backbone, where arms' names say what they change."""
    backbones = {backbone for backbone, _ in results.kinds.values()}
    return results.kinds if len(backbones) > 1 or _claims(results) else {}


def _filters(results: Results) -> list[Filter]:
    """One for each value, where there are two or more."""
    kinds: tuple[Literal["backbone", "penalty"], ...] = ("backbone", "penalty")
    found: list[Filter] = []
    for kind, values in zip(kinds, zip(*_kinds(results).values(), strict=True), strict=False):
        distinct = list(dict.fromkeys(values))
        made = [Filter(kind=kind, value=value, anchor=f"show-{kind}-{index}") for index, value in enumerate(distinct)]
        found += made if len(made) > 1 else []
    return found


def _claims(results: Results) -> list[str]:
    """What their authors say of the rivals in a study."""
    penalties = dict.fromkeys(penalty for _, penalty in results.kinds.values())
    claims = [PENALTIES[penalty].claim for penalty in penalties if penalty in PENALTIES and PENALTIES[penalty].claim]
    nested = any("Matryoshka" in backbone for backbone, _ in results.kinds.values())
    return claims + ([MATRYOSHKA] if nested else [])


def _layer(results: Results, layer: int) -> Layer:
    rows = results.of_layer(layer)
    sound = {(row.arm, row.seed) for row in rows if row.degenerate is None}
    curves = [curve for curve in results.curves if curve.layer == layer and (curve.arm, curve.seed) in sound]
    curves = [curve for curve in curves if curve.sparsity in (None, results.shown_level)]
    entries = [entry for entry in results.differences if entry.layer == layer]
    arms = [arm.arm for arm in results.arms]
    by_name = {arm: [row for row in rows if row.arm == arm] for arm in arms}
    main, suite = tables.main_columns(results), tables.suite_columns(results)
    return Layer(
        layer=layer,
        columns=main,
        model=tables.model_line(results, rows),
        reported=tables.reported_lines(results, rows),
        arms=[tables.arm_line(main, arm, of_arm) for arm, of_arm in by_name.items()],
        suite_columns=suite,
        suite=[tables.arm_line(suite, arm, of_arm) for arm, of_arm in by_name.items()],
        reasons=tables.reasons(rows),
        stability=tables.stability(arms, rows),
        answers=answers(results, entries),
        planned=tables.planned(results, entries),
        exploratory=tables.exploratory(results, entries),
        tasks=[tables.task(results, task, rows) for task in results.tasks],
        separated=separated_pairs(results, layer),
        examples=[shown for shown in results.examples if shown.layer == layer],
        not_drawn=[arm for arm in arms if arm not in by_arm(rows, FVU)],
        plots={
            "forest": _forest(f"forest-{layer}", results, entries),
            "probing": plots.probing_by_k(f"probing-{layer}", rows, arms, results.probe_sizes),
            "frontiers": against_l0(f"frontiers-{layer}", results.whole_layer(layer), arms, [FVU]),
            "pareto": against_l0(f"pareto-{layer}", results.whole_layer(layer), arms, measured(results)),
            "curves": plots.learning_curves(f"curves-{layer}", curves, arms),
            "capture": latent_plots.pair_capture(f"capture-{layer}", rows, arms),
            "histograms": latent_plots.histograms(f"histograms-{layer}", rows, arms),
        },
    )
