"""The page, the files beside it and the terminal's table, of a real study whose rows stand for many arms and seeds."""

import csv
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_results import altered, compared
from small_study import Study

from pipeline.report.collect import REPORTED_LLM_PROBING, collect
from pipeline.report.columns import Metric
from pipeline.report.differences import differences
from pipeline.report.metrics import columns
from pipeline.report.page import write_report
from pipeline.report.results import Arm, Results, Row
from pipeline.report.statistics import over_pairs
from pipeline.report.suite_metrics import SUITE
from pipeline.report.terminal import results_table
from pipeline.study.arms import ARMS
from pipeline.study.planned import PlannedSAE

KS = ["1", "5"]
DEGENERATE = "no latent fires on any held-out token"
NO_PAIRS = "no two latents fire together on 5 rows or more"
PROBING_1 = ("sparse_probing", "1")


def written(results: Results, folder: Path) -> str:
    """The page of a report."""
    return Path(write_report(results, folder)).read_text()


@dataclass(frozen=True)
class Many:
    """A real study, and studies of more arms, seeds and layers made of it."""

    real: Results

    def row(self, arm: str, seed: int, layer: int) -> Row:
        """The row of `full` under another name, its metrics a little changed."""
        row = self.real.rows[1].model_copy(update={"arm": arm, "seed": seed, "layer": layer})
        rng = np.random.default_rng([list(ARMS).index(arm), seed, layer])
        metrics = [column for column in columns(self.real) if isinstance(column, Metric)]
        values = [(metric.path, metric.of(row)) for metric in metrics]
        return altered(row, {path: value * rng.uniform(0.97, 1.0) for path, value in values if isinstance(value, float)})

    def results(
        self,
        seeds: tuple[int, ...] = (0, 1),
        layers: tuple[int, ...] = (2,),
        arms: Iterable[str] = ("full", "no-contrast", "topk-0.2"),
    ) -> Results:
        """A study of some built-in arms."""
        arms = tuple(arms)
        cells = [(arm, seed, layer) for layer in layers for arm in arms for seed in seeds]
        return compared(
            self.real,
            description="What does the penalty change in its <script>alert(1)</script> SAEs?",
            generated="2026-11-23T08:00:00+00:00",
            arms=tuple(
                Arm(arm=arm, run=ARMS[arm].run, question=ARMS[arm].question, base=None if arm == "full" else ARMS[arm].base)
                for arm in arms
            ),
            rows=tuple(self.row(*cell) for cell in cells),
            curves=tuple(
                self.real.curves[1].model_copy(update={"arm": arm, "seed": seed, "layer": layer})
                for arm, seed, layer in cells
            ),
            examples=tuple(
                shown.model_copy(update={"layer": layer})
                for layer in layers
                for shown in self.real.examples
                if shown.arm in arms
            ),
        )

    def troubled(self) -> Results:
        """All built-in arms: one degenerate in both seeds, one in a single seed, one without a pair capture rate."""
        results = self.results(arms=ARMS)
        rows: list[Row] = []
        for row in results.rows:
            if row.arm == "unweighted" or (row.arm == "coef-0.2" and row.seed == 1):
                row = degenerate(row)
            elif row.arm == "topk-0.2":
                row = without_pairs(row)
            rows.append(row)
        first, *others = results.examples
        latent, *latents = first.latents
        context = latent.contexts[0].model_copy(
            update={"before": "def f(<b>x</b>):", "token": "<script>", "after": " & more"}
        )
        latent = latent.model_copy(update={"contexts": (context, *latent.contexts[1:])})
        examples = (first.model_copy(update={"latents": (latent, *latents)}), *others)
        return compared(results, rows=tuple(rows), examples=examples)


def degenerate(row: Row) -> Row:
    """A row of an SAE that failed to train."""
    kept = {"arm", "seed", "layer", "sae", "steps", "tokens", "resets", "seconds"}
    return Row.model_validate(row.model_dump(include=kept) | {"degenerate": DEGENERATE})


def without_pairs(row: Row) -> Row:
    """A row of an SAE no two of whose latents fire together."""
    assert row.bpcr
    curves = {
        name: [point.model_copy(update={"union": None}).model_dump() for point in points]
        for name, points in (("by_topk", row.bpcr.by_topk), ("by_pairs", row.bpcr.by_pairs))
    }
    rates: dict[str, Any] = dict.fromkeys(row.bpcr.model_dump())
    return altered(row, {("bpcr",): rates | {"chance": 0.18, "live": 40, "pairs": 0, "reason": NO_PAIRS} | curves})


@pytest.fixture(scope="session")
def many(study: Study) -> Many:
    """Studies made of the small one."""
    return Many(collect(study.plan, study.workspace))


class Page(HTMLParser):
    """What the tests ask of the page: balanced tags, ids, links and every tag with its attributes."""

    VOID = frozenset({"meta", "col", "br", "link", "img", "input"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, attribute: str) -> list[str]:
        return [value for _, attrs in self.tags if (value := attrs.get(attribute)) is not None]


@pytest.fixture(scope="module")
def report(many: Many, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the report of `Many.troubled`."""
    return Path(write_report(many.troubled(), tmp_path_factory.mktemp("report") / "demo")).parent


@pytest.fixture(scope="module")
def troubled(report: Path) -> str:
    return (report / "index.html").read_text()


def table_row(page: str, arm: str) -> str:
    """An arm's row of the main table, or of the first table of a part of the page."""
    page = page[max(0, page.find('<table class="main">')) :]
    found = re.search(rf'<tr[^>]*><th scope="row"[^>]*><span class="arm arm-{re.escape(arm)}">.*?</tr>', page, re.DOTALL)
    assert found
    return found[0]


def test_page_is_one_small_self_contained_file(troubled: str) -> None:
    assert len(troubled.encode()) < 2_000_000
    assert "http" not in troubled
    page = Page(troubled)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert page.all("src") == []
    assert all(href.startswith("#") for href in page.all("href"))
    assert "@import" not in troubled
    assert re.findall(r"url\((?!#)", troubled) == []


def test_every_id_is_unique_and_every_reference_resolves(many: Many, tmp_path: Path) -> None:
    text = written(many.results(layers=(1, 2)), tmp_path)
    page = Page(text)
    ids = page.all("id")
    assert len(ids) == len(set(ids))
    references = (
        {href[1:] for href in page.all("href")}
        | set(page.all("aria-labelledby"))
        | set(re.findall(r"url\(#([^)]*)\)", text))
    )
    assert references <= set(ids)


def test_plots_are_named_and_follow_the_colour_mode(troubled: str) -> None:
    plots = re.findall(r"<svg.*?</svg>", troubled, re.DOTALL)
    assert len(plots) == 7
    for plot in plots:
        description = re.search(r'role="img"[^>]*aria-label="([^"]*)"', plot)
        assert description
        assert "baseline" in description[1]
        assert re.findall(r"#[0-9a-fA-F]{6}\b", plot) == []
        assert {"var(--ink)", "var(--baseline)"} <= set(re.findall(r"var\(--[a-z-]+\)", plot))
    for plot in (plots[0], *plots[2:6]):  # the others show planned differences and the three arms that stand out
        assert all(f">{arm}</text>" in plot for arm in ARMS if arm != "unweighted")


def test_tables_have_captions_and_scopes(troubled: str) -> None:
    # all arms, four planned metrics, two tasks, three references, every SAE
    assert troubled.count("<table") == troubled.count("<caption") == 1 + 1 + 4 + 2 + 3 + 1
    assert "<th>" not in troubled


def test_means_and_standard_errors_over_seeds(many: Many, tmp_path: Path) -> None:
    results = many.results()
    rows = [altered(row, {("fvu",): 0.1 if row.seed == 0 else 0.2}) if row.arm == "full" else row for row in results.rows]
    page = written(results.model_copy(update={"rows": tuple(rows)}), tmp_path)
    cells = re.findall(r"<td>(.*?)</td>", table_row(page, "full"))
    assert len(cells) == 4 + len(KS) + 3 + 1 + 1
    assert cells[0] == '0.150 <span class="spread">±0.050</span>'


def test_degenerate_saes_are_named_and_not_averaged(troubled: str) -> None:
    assert f"degenerate: {DEGENERATE}</td>" in table_row(troubled, "unweighted")
    partly = table_row(troubled, "coef-0.2")
    assert "±" not in partly
    assert f"without seed 1, degenerate: {DEGENERATE}</td>" in troubled
    assert "Nothing to draw for: unweighted." in troubled


def frontiers(many: Many) -> Results:
    """Two arms on two backbones, one with a rival's penalty, at three L0."""
    results = many.results(arms=("full", "no-contrast"))
    kinds = {"full": ("relu", "contrast"), "no-contrast": ("batchtopk, Matryoshka", "c2r")}
    rows = [
        altered(row, {("sparsity",): level, ("l0",): level * (1 + 0.01 * row.seed), ("fvu",): 1 / level})
        for row in results.rows
        for level in (10.0, 20.0, 40.0)
    ]
    rows = [row.model_copy(update=dict(zip(("backbone", "penalty"), kinds[row.arm], strict=True))) for row in rows]
    curves = [curve.model_copy(update={"sparsity": 20.0}) for curve in results.curves]
    return compared(results, rows=tuple(rows), curves=tuple(curves))


def test_a_page_of_frontiers_shows_one_l0_in_its_table_and_all_in_its_plots(many: Many, tmp_path: Path) -> None:
    page = written(frontiers(many), tmp_path)
    assert "Every arm was trained at L0 10, 20, 40; this table has the SAEs of L0 20" in page
    cells = re.findall(r"<td>(.*?)</td>", table_row(page, "full"))
    assert cells[0].startswith("0.050")
    plot = page[page.index("Against sparsity, the figure") :]
    assert re.search(r"FVU, full: 0\.058 at L0 23\.\d", plot)  # mean of all three
    assert "read off the arm’s own frontier" in page
    assert str(results_table(frontiers(many)).title).endswith("± its standard error, of the SAEs trained at L0 20")
    assert page.count("<td>10</td>") >= 4  # each SAE by itself says at which L0 it was trained


def test_backbones_and_penalties_are_columns_and_filters(many: Many, tmp_path: Path) -> None:
    page = written(frontiers(many), tmp_path)
    assert '<td class="kind">batchtopk, Matryoshka</td>\n<td class="kind">c2r</td>' in table_row(page, "no-contrast")
    for kind, value in (
        ("backbone", "relu"),
        ("backbone", "batchtopk, Matryoshka"),
        ("penalty", "contrast"),
        ("penalty", "c2r"),
    ):
        (anchor,) = re.findall(rf'id="(show-{kind}-\d)" checked> {value}</label>', page)
        assert f'body:has(#{anchor}:not(:checked)) tr[data-{kind}="{value}"]' in page
        assert page.count(f' data-{kind}="{value}"') > 4  # in all tables of arms
    assert "C2R (Jin et al., ICML 2026" in page
    assert "Matryoshka SAEs (Bussmann et al." in page
    assert "beside its rivals</title>" in page


def test_a_long_list_of_what_is_missing_is_cut(many: Many, tmp_path: Path) -> None:
    page = written(many.results().model_copy(update={"missing": tuple(f"arm seed {seed}" for seed in range(40))}), tmp_path)
    assert "40 of its SAEs are not evaluated yet: arm seed 0, " in page
    assert "arm seed 11 and 28 more.</p>" in page


def test_a_study_of_one_kind_needs_no_filters(many: Many, tmp_path: Path) -> None:
    page = written(many.results(), tmp_path)
    assert "<fieldset>" not in page
    assert "Backbone" not in page
    assert "data-penalty" not in page
    assert "ablated</title>" in page


def test_missing_pair_capture_rate_says_why(troubled: str) -> None:
    row = table_row(troubled, "topk-0.2")
    assert f'colspan="1">not measured: {NO_PAIRS}</td>' in row
    assert row.count("±") == 4 + len(KS) + 3 + 1


def test_descriptions_and_tokens_are_escaped(troubled: str) -> None:
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in troubled
    assert "<mark>&lt;script&gt;</mark>" in troubled
    assert "def f(&lt;b&gt;x&lt;/b&gt;):" in troubled


def test_everything_that_unfolds_can_be_reached_and_is_named(many: Many, troubled: str) -> None:
    page = Page(troubled)
    tags = [tag for tag, _ in page.tags]
    latents = sum(len(shown.latents) for shown in many.real.examples)
    assert latents > 10
    assert tags.count("details") == tags.count("summary") == 4 + latents + 1 + 1
    scrolling = [attrs for _, attrs in page.tags if attrs.get("class") in ("scroll", "scroll spreads", "canvas")]
    assert len(scrolling) > 10
    for attrs in scrolling:
        assert attrs["tabindex"] == "0"
        assert attrs.get("aria-labelledby") or attrs.get("aria-label")


def test_reported_accuracies_stand_beside_ours_only_for_that_model(many: Many, troubled: str, tmp_path: Path) -> None:
    assert "reported" not in re.sub("<style>.*</style>", "", troubled, flags=re.DOTALL)
    results = many.results()
    ours = {("llm_probing", "1"): 0.674275, ("llm_probing", "all"): 0.939825}
    rows = tuple(altered(row, ours) for row in results.rows)
    text = written(results.model_copy(update={"reported_llm_probing": REPORTED_LLM_PROBING, "rows": rows}), tmp_path)

    def cells(name: str) -> list[str]:
        found = re.search(rf'<th scope="row">{name}</th>(.*?)</tr>', text, re.DOTALL)
        assert found
        return re.findall(r"<td>(.*?)</td>", found[1])

    assert cells("reported") == ["0.684", "0.775", "0.939"]
    measured, difference = cells("measured here"), cells("difference")
    assert (measured[0], difference[0]) == ("0.674", "−0.010")
    assert (measured[-1], difference[-1]) == ("0.940", "+0.001")


def test_verdicts_stand_in_the_tables_of_planned_comparisons(many: Many, tmp_path: Path) -> None:
    results = many.results(seeds=(0, 1, 2))
    # Exactly alike in `no-contrast`, and in `topk-0.2` different beyond doubt.
    rows = [
        altered(row, {PROBING_1: 0.7 + (0.1 + 0.001 * row.seed if row.arm == "topk-0.2" else 0.0)}) for row in results.rows
    ]
    text = written(compared(results, rows=tuple(rows)), tmp_path)
    assert "Exactly the same in every seed: the two arms never differed." in text
    table = re.search(r'class="verdicts">.*?</table>', text, re.DOTALL)
    assert table
    assert re.search(
        r"topk-0.2</span>.*?Better by more than 0\.01\.</td>.*?\+0.101</td>.*?\+0.099 to \+0.103", table[0], re.DOTALL
    )
    (said,) = re.findall(r"<strong>(Of the .*?)</strong>", text)
    assert said.startswith("Of the 8 planned comparisons, 1 can be told from seed noise"), said


def test_one_seed_shows_no_spread_and_says_so(many: Many, tmp_path: Path) -> None:
    text = written(many.results(seeds=(0,)), tmp_path)
    assert "One seed cannot tell an arm from luck." in text
    assert "±" not in text


def test_banner_only_on_the_demonstration(many: Many, troubled: str, tmp_path: Path) -> None:
    warning = "Small demonstration model: nothing here says anything about Gemma."
    assert troubled.index(warning) < troubled.index("<h1>")
    assert warning not in written(many.results(seeds=(0,)).model_copy(update={"is_demo": False}), tmp_path)


def test_unfinished_study_says_what_is_missing(many: Many, tmp_path: Path) -> None:
    results = many.results(arms=("full", "no-contrast"))
    rows = tuple(row for row in results.rows if row.arm == "full")
    missing = ("no-contrast seed 0 layer 2", "no-contrast seed 1 layer 2")
    text = written(compared(results, rows=rows, missing=missing), tmp_path)
    assert "2 of its SAEs are not evaluated yet: no-contrast seed 0 layer 2, no-contrast seed 1 layer 2." in text
    assert "not evaluated yet</td>" in table_row(text, "no-contrast")


def test_every_sae_degenerate_still_makes_a_page(many: Many, tmp_path: Path) -> None:
    results = many.results()
    text = written(compared(results, curves=(), rows=tuple(degenerate(row) for row in results.rows)), tmp_path)
    Page(text)
    assert "<svg" not in text


def test_same_results_give_the_same_bytes(many: Many, report: Path, tmp_path: Path) -> None:
    write_report(many.troubled(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "differences.csv",
        "findings.md",
        "index.html",
        "manifest.json",
        "results.csv",
        "results.json",
    ]
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (report / path.name).read_bytes()


def test_json_and_csv_hold_the_results_unrounded(many: Many, report: Path) -> None:
    results = many.troubled()
    assert Results.model_validate_json((report / "results.json").read_text()) == results
    with (report / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(results.rows)
    for line, row in zip(lines, results.rows, strict=True):
        assert None not in line
        for column in columns(results):
            value = column.of(row)
            assert line[column.name] == ("" if value is None else str(value))
        if row.degenerate:
            assert line["degenerate"] == DEGENERATE
            assert line["fvu"] == line["sparse_probing_1"] == line["bpcr_union"] == ""
            continue
        assert row.sparse_probing
        assert {k: float(line[f"sparse_probing_{k}"]) for k in row.sparse_probing} == row.sparse_probing
        for task, accuracies in (row.llm_probing_by_task or {}).items():
            assert float(line[f"llm_probing_by_task_{task}_5"]) == accuracies["5"]


def test_csv_columns_do_not_depend_on_the_rows(many: Many, report: Path, tmp_path: Path) -> None:
    results = many.results()
    write_report(compared(results, curves=(), rows=(degenerate(results.rows[0]),)), tmp_path)
    headers = [(folder / "results.csv").read_text().splitlines()[0] for folder in (report, tmp_path)]
    assert headers[0] == headers[1]


def test_nan_is_refused(many: Many, tmp_path: Path) -> None:
    rows = (altered(many.real.rows[0], {("fvu",): math.nan}),)
    with pytest.raises(ValueError, match="JSON"):
        write_report(many.real.model_copy(update={"rows": rows}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_an_sae_that_others_trained_is_shown_without_a_recipe_and_a_log(study: Study, tmp_path: Path) -> None:
    *ours, last = study.plan.saes
    outside = PlannedSAE(
        origin="folder",
        arm="scope",
        seed=0,
        layer=2,
        artefact=last.artefact,
        evaluation=last.evaluation,
        baseline=last.baseline,
    )
    results = collect(replace(study.plan, saes=(*ours, outside)), study.workspace)
    assert results.arms[-1] == Arm(arm="scope", run=None, question=None, base=None)
    assert [curve.arm for curve in results.curves] == ["baseline", "full"]
    assert not [entry for entry in results.differences if "scope" in (entry.arm, entry.reference)]
    page = written(results, tmp_path)
    Page(page)
    assert f"<td>{results.rows[-1].fvu:.3f}</td>" in table_row(page, "scope")
    assert "scope" in list(results_table(results).columns[0].cells)
    *_, line = csv.DictReader((tmp_path / "results.csv").read_text().splitlines())
    assert line["arm"] == "scope"
    assert [line[name] for name in ("steps", "tokens", "resets", "seconds")] == [""] * 4
    assert Results.model_validate_json((tmp_path / "results.json").read_text()).rows[-1].steps is None


def test_every_metric_has_its_place_on_the_page_and_in_the_glossary(many: Many, tmp_path: Path) -> None:
    results = many.results()
    without = written(results, tmp_path)
    assert "SAEBench</h3>" not in without
    assert '<div id="composition">' not in without
    added: dict[tuple[str, ...], Any] = {("stability",): {"seeds": 1, "mmcs": 0.5, "mcc": 0.4, "reason": None}}
    for column in SUITE:
        added[column.path[:1]] = added.get(column.path[:1], {}) | {column.path[1]: 0.5}
    added["absorption",]["reason"] = "the model spells too little"
    results = results.model_copy(update={"rows": tuple(altered(row, added) for row in results.rows)})
    page = written(results.model_copy(update={"differences": tuple(differences(results))}), tmp_path)
    assert page.count(">Absorption: the model spells too little.</p>") == 1
    for column in columns(many.real):
        if isinstance(column, Metric):
            assert f'<a class="term" href="#{column.term.anchor}">{column.heading}</a>' in page, column.name
            assert page.count(f'<div id="{column.term.anchor}">') == 1, column.name


@pytest.mark.parametrize(("ks", "titles"), [([2, 5], ["top 2", "top 5"]), ([5], ["top 5"]), ([1, 2, 5], ["top 1", "top 5"])])
def test_the_terminal_shows_the_smallest_and_the_largest_probe(many: Many, ks: list[int], titles: list[str]) -> None:
    accuracies = {str(k): 0.7 for k in ks} | {"all": 0.9}
    rows = [altered(row, {("sparse_probing",): accuracies, ("llm_probing",): accuracies}) for row in many.results().rows]
    table = results_table(many.real.model_copy(update={"k_values": tuple(ks), "rows": tuple(rows)}))
    assert [column.header for column in table.columns][3:-3] == titles
    assert "the model" in list(table.columns[0].cells)


def test_what_seeds_have_in_common_has_an_interval_from_three_on(many: Many, tmp_path: Path) -> None:
    results, values = many.results(), {0: 0.35, 1: 0.5, 2: 0.65}
    one = [row for row in results.rows if row.seed == results.rows[0].seed]
    found = [
        altered(row, {("seed",): seed, ("stability",): {"seeds": 2, "mcc": mcc, "mmcs": 0.75, "reason": None}})
        for row in one
        for seed, mcc in values.items()
    ]
    page = written(results.model_copy(update={"rows": tuple(found)}), tmp_path)
    part = page[page.index('id="stability-') :]
    interval = over_pairs([*values.values()])
    cells = re.findall(r"<td[^>]*>(.*?)</td>", table_row(part, "full"))
    assert cells[0] == "3"
    assert cells[1] == f"{interval.mean:.3f}"
    assert interval.low is not None
    assert cells[2] == f"{interval.low:.3f} to {interval.high:.3f}"
    assert cells[3] == "0.750"
