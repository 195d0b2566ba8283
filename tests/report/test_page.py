import csv
import json
import math
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline.report.collect import REPORTED_LLM_PROBING
from pipeline.report.differences import differences
from pipeline.report.page import write_report
from pipeline.report.terminal import results_table
from pipeline.study.arms import ARMS
from pipeline.study.recipe import TrainConfig

KS = [1, 2, 5, 10, 20]
TASKS = {
    "python/text-kind": ["source", "docstring", "reference"],
    "python/package": ["asyncio", "email", "unittest"],
    "python/docstring-of": ["class", "function", "module"],
}
DEGENERATE = "no latent fires on any held-out token"
NO_PAIRS = "no two latents fire together on 5 rows or more"


def _written(results: dict[str, Any], folder: Path) -> Path:
    return Path(write_report(results, folder))


def _accuracies(rng: np.random.Generator, top: float) -> dict[str, float]:
    return {str(k): float(top - 0.27 / (1 + 0.6 * k) + rng.normal(0, 0.006)) for k in KS} | {"all": top}


def _row(arm: str, seed: int, layer: int) -> dict[str, Any]:
    rng = np.random.default_rng([list(ARMS).index(arm), seed, layer])
    l0, lift = 22 + 8 * rng.random(), 1.2 + rng.random()
    by_task = {task: _accuracies(rng, 0.95 - 0.02 * index) for index, task in enumerate(TASKS)}
    llm = {task: _accuracies(np.random.default_rng(index), 0.97 - 0.02 * index) for index, task in enumerate(TASKS)}

    def over_tasks(values: dict[str, dict[str, float]]) -> dict[str, float]:
        return {k: float(np.mean([values[task][k] for task in TASKS])) for k in [*map(str, KS), "all"]}

    return {
        "arm": arm,
        "seed": seed,
        "layer": layer,
        "sae": f"{list(ARMS).index(arm):010d}{seed}{layer}",
        "steps": 3000,
        "tokens": 768_000,
        "seconds": float(8 + rng.random()),
        "degenerate": None,
        "fvu": float(3.4 / l0 + rng.normal(0, 0.004)),
        "cosine": float(0.94 + 0.01 * rng.random()),
        "l0": float(l0),
        "dead_fraction": float(0.05 * rng.random()),
        "max_decoder_cosine": float(0.4 + 0.05 * rng.random()),
        "resets": 0 if arm == "baseline" else int(rng.integers(4, 20)),
        "sparse_probing": over_tasks(by_task),
        "llm_probing": over_tasks(llm),
        "sparse_probing_by_task": by_task,
        "llm_probing_by_task": llm,
        "bpcr": {
            "row": 0.16 * lift,
            "column": 0.16 * lift,
            "union": 0.18 * lift,
            "mutual": 0.14 * lift,
            "chance": 0.18,
            "random_tied": float(0.42 + 0.04 * rng.random()),
            "lift": lift,
            "kappa": (0.18 * lift - 0.18) / 0.82,
            "strength_weighted": 0.2 * lift,
            "permuted": 0.1801,
            "permuted_std": 0.002,
            "phi_union": 0.17 * lift,
            "phi_chance": 0.18,
            "phi_lift": 0.17 * lift / 0.18,
            "phi_random_tied": 0.4,
            "live": 240,
            "pairs": 240,
            "reason": None,
            "by_topk": [
                {"topk": k, "union": min(1, 1.7 * k * lift), "chance": min(1, 1.8 * k), "random_tied": min(1, 0.3 + k)}
                for k in (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
            ],
            "by_pairs": [
                {"q": q, "union": 0.18 * lift / q**0.2, "chance": 0.18, "random_tied": 0.4} for q in (0.25, 0.5, 1, 2, 4)
            ],
        },
        "loss": {"clean": 3.1, "sae": 3.4, "zero": 8.0, "mean": 6.0, "recovered_zero": 0.94, "recovered_mean": 0.9}
        | {"reason": None},
        "interference": {
            "own": {"pairs": 300, "interference": float(0.02 + 0.01 * rng.random()), "co_activation": 0.05},
            "fixed": {"pairs": 290, "interference": float(0.02 + 0.01 * rng.random()), "co_activation": 0.04}
            | {"same_direction": 0.8},
            "reason": None,
        },
        "density": {"edges": list(np.linspace(-5, 0, 26)), "counts": [int(8 + seed + x % 7) for x in range(25)], "dead": 3},
        "decoder_cosine": {
            "edges": list(np.linspace(-1, 1, 41)),
            "counts": [int(1e4 * math.exp(-((x - 20) ** 2) / 9)) for x in range(40)],
        },
        "ground_truth": None,
    }


def _degenerate(row: dict[str, Any]) -> dict[str, Any]:
    return dict.fromkeys(row) | {name: row[name] for name in list(row)[:7]} | {"degenerate": DEGENERATE}


def _curve(row: dict[str, Any]) -> dict[str, Any]:
    steps = list(range(50, 3001, 50))
    decay = [math.exp(-step / 350) for step in steps]
    alive = row["degenerate"] is None
    return {
        "arm": row["arm"],
        "seed": row["seed"],
        "layer": row["layer"],
        "step": steps,
        "fvu": [row["fvu"] + 0.8 * part if alive else None for part in decay],
        "l0": [row["l0"] + 100 * part if alive else 0.0 for part in decay],
        "dead_fraction": [row["dead_fraction"] if alive else 1.0 for _ in steps],
    }


def _results(
    seeds: tuple[int, ...] = (0, 1),
    layers: tuple[int, ...] = (2,),
    arms: Iterable[str] = ("full", "no-contrast", "topk-0.2"),
) -> dict[str, Any]:
    rows = [_row(arm, seed, layer) for layer in layers for arm in arms for seed in seeds]
    results = {
        "experiment": "demo",
        "description": "A small model: does the contrastive penalty change what its <script>alert(1)</script> SAEs find?",
        "generated": "2026-11-23T08:00:00+00:00",
        "version": "0.1.0",
        "is_demo": True,
        "is_synthetic": False,
        "model": {"name": "tiny-gemma2", "facts": {"parameters": 345_216, "tokens": 1_331_200, "heldout_loss": 3.1234567}},
        "reported_llm_probing": None,
        "store": {
            "key": "0123456789ab",
            "rows": 819_200,
            "bytes": 209_715_200,
            "layers": [1, 2],
            "context": 64,
            "d_in": 64,
            "seconds": 12.3,
            "corpus": "python",
        },
        "tasks": [
            {"name": name, "classes": classes, "train_size": 600, "test_size": 300} for name, classes in TASKS.items()
        ],
        "training": TrainConfig(d_sae=256, steps=3000, batch_size=256).model_dump() | {"heldout_rows": 32_768},
        "arms": [
            {"arm": name, "run": ARMS[name].run, "question": ARMS[name].question}
            | {"base": None if name == "full" else ARMS[name].base}
            for name in arms
        ],
        "k_values": KS,
        "rows": rows,
        "curves": [_curve(row) for row in rows],
        "missing": [],
        "cost": {
            "model_seconds": 61.0,
            "extract_seconds": 12.3,
            "train_seconds": 171.0,
            "evaluate_seconds": 44.0,
            "store_bytes": 209_715_200,
        },
        "examples": [_examples(arm, 0, layer) for layer in layers for arm in ("full", "baseline") if arm in arms],
    }
    return results | {"differences": differences(results)}


def _examples(arm: str, seed: int, layer: int) -> dict[str, Any]:
    why = ["most captured"] * 2 + ["least captured"] * 2 + ["density"] * 6
    contexts = [
        {
            "strength": 9.5 - i,
            "sequence": i,
            "position": 7,
            "before": "def f(<b>x</b>):\n    return ",
            "token": "<script>",
            "after": " & more",
        }
        for i in range(5)
    ]
    latents = [
        {"latent": i, "why": reason, "density": 0.01, "captured": i, "pairs": 9, "contexts": contexts}
        for i, reason in enumerate(why)
    ]
    return {"arm": arm, "seed": seed, "layer": layer, "latents": latents, "reason": None}


def _with_rows(results: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    changed = results | {"rows": rows}
    return changed | {"differences": differences(changed)}


def _troubled() -> dict[str, Any]:
    """All built-in arms: one degenerate in both seeds, one in a single seed, one without a pair capture rate."""
    results = _results(arms=ARMS)
    for row in results["rows"]:
        if row["arm"] == "unweighted" or (row["arm"] == "coef-0.2" and row["seed"] == 1):
            row.update(_degenerate(row))
        if row["arm"] == "topk-0.2":
            curves = {name: [point | {"union": None} for point in row["bpcr"][name]] for name in ("by_topk", "by_pairs")}
            row["bpcr"] = dict.fromkeys(row["bpcr"]) | {"chance": 0.18, "live": 40, "pairs": 0, "reason": NO_PAIRS} | curves
    results["curves"] = [_curve(row) for row in results["rows"]]
    return results | {"differences": differences(results)}


class _Page(HTMLParser):
    """What the tests ask of the page: balanced tags, ids, links and every tag with its attributes."""

    VOID = frozenset({"meta", "col", "br", "link", "img"})

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
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the report of `_troubled`."""
    return _written(_troubled(), tmp_path_factory.mktemp("report") / "demo").parent


@pytest.fixture(scope="module")
def troubled(report: Path) -> str:
    return (report / "index.html").read_text()


def _table_row(page: str, arm: str) -> str:
    found = re.search(rf'<tr><th scope="row"[^>]*><span class="arm arm-{re.escape(arm)}">.*?</tr>', page, re.DOTALL)
    assert found
    return found[0]


def test_page_is_one_small_self_contained_file(troubled: str) -> None:
    assert len(troubled.encode()) < 2_000_000
    assert "http" not in troubled
    page = _Page(troubled)
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert page.all("src") == []
    assert all(href.startswith("#") for href in page.all("href"))
    assert "@import" not in troubled
    assert re.findall(r"url\((?!#)", troubled) == []


def test_every_id_is_unique_and_every_reference_resolves(tmp_path: Path) -> None:
    text = _written(_results(layers=(1, 2)), tmp_path).read_text()
    page = _Page(text)
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
    for plot in plots[1:5]:  # the others show planned differences and the three arms that stand out
        assert all(f">{arm}</text>" in plot for arm in ARMS if arm != "unweighted")


def test_tables_have_captions_and_scopes(troubled: str) -> None:
    # all arms, four planned metrics, three tasks, three references, every SAE
    assert troubled.count("<table") == troubled.count("<caption") == 1 + 4 + 3 + 3 + 1
    assert "<th>" not in troubled


def test_means_and_half_ranges_over_seeds(tmp_path: Path) -> None:
    results = _results()
    for row in results["rows"]:
        if row["arm"] == "full":
            row["fvu"] = 0.1 if row["seed"] == 0 else 0.2
    cells = re.findall(r"<td>(.*?)</td>", _table_row(_written(results, tmp_path).read_text(), "full"))
    assert len(cells) == 4 + len(KS) + 1 + 1 + 3
    assert cells[0] == '0.150 <span class="spread">±0.050</span>'


def test_degenerate_saes_are_named_and_not_averaged(troubled: str) -> None:
    assert f"degenerate: {DEGENERATE}</td>" in _table_row(troubled, "unweighted")
    partly = _table_row(troubled, "coef-0.2")
    assert "±" not in partly
    assert f"without seed 1, degenerate: {DEGENERATE}</td>" in troubled
    assert "No results to draw of: unweighted." in troubled


def test_missing_pair_capture_rate_says_why(troubled: str) -> None:
    row = _table_row(troubled, "topk-0.2")
    assert f'colspan="3">not measured: {NO_PAIRS}</td>' in row
    assert row.count("±") == 4 + len(KS) + 1 + 1


def test_descriptions_and_tokens_are_escaped(troubled: str) -> None:
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in troubled
    assert "<mark>&lt;script&gt;</mark>" in troubled
    assert "def f(&lt;b&gt;x&lt;/b&gt;):" in troubled


def test_everything_that_unfolds_can_be_reached_and_is_named(troubled: str) -> None:
    page = _Page(troubled)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("details") == tags.count("summary") == 4 + 2 * 10 + 1 + 1
    scrolling = [attrs for _, attrs in page.tags if attrs.get("class") in ("scroll", "scroll spreads", "canvas")]
    assert len(scrolling) > 10
    for attrs in scrolling:
        assert attrs["tabindex"] == "0"
        assert attrs.get("aria-labelledby") or attrs.get("aria-label")


def test_reported_accuracies_stand_beside_ours_only_for_that_model(troubled: str, tmp_path: Path) -> None:
    assert "reported" not in re.sub("<style>.*</style>", "", troubled, flags=re.DOTALL)
    results = _results() | {"reported_llm_probing": REPORTED_LLM_PROBING}
    for row in results["rows"]:
        row["llm_probing"] = row["llm_probing"] | {"1": 0.674275, "all": 0.939825}
    text = _written(results, tmp_path).read_text()
    rows = {
        name: re.findall(r"<td>(.*?)</td>", re.search(rf'<th scope="row">{name}</th>(.*?)</tr>', text, re.DOTALL)[1])  # pyright: ignore
        for name in ("measured here", "reported", "difference")
    }
    assert rows["reported"] == ["0.684", "0.726", "0.775", "0.821", "0.859", "0.939"]
    assert (rows["measured here"][0], rows["difference"][0]) == ("0.674", "−0.010")
    assert (rows["measured here"][-1], rows["difference"][-1]) == ("0.940", "+0.001")


def test_verdicts_stand_in_the_tables_of_planned_comparisons(tmp_path: Path) -> None:
    results = _results(seeds=(0, 1, 2))
    for row in results["rows"]:
        # Exactly alike in `no-contrast`, and in `topk-0.2` different beyond doubt.
        shift = {"no-contrast": 0.0, "full": 0.0, "topk-0.2": 0.1 + 0.001 * row["seed"]}[row["arm"]]
        row["sparse_probing"] = row["sparse_probing"] | {"1": 0.7 + shift}
    text = _written(_with_rows(results, results["rows"]), tmp_path).read_text()
    assert "Exactly the same in every seed: the two arms never differed." in text
    table = re.search(r'class="verdicts">.*?</table>', text, re.DOTALL)
    assert table
    assert re.search(r"topk-0.2</span>.*?Better\.</td>.*?\+0.101</td>.*?\+0.099 to \+0.103", table[0], re.DOTALL)
    assert "Of the 8 planned comparisons, 1 can be told from the luck of 3 seeds." in text


def test_one_seed_shows_no_spread_and_says_so(tmp_path: Path) -> None:
    text = _written(_results(seeds=(0,)), tmp_path).read_text()
    assert "One seed cannot tell an arm from luck." in text
    assert "±" not in text


def test_banner_only_on_the_demonstration(troubled: str, tmp_path: Path) -> None:
    warning = "Small demonstration model: nothing here says anything about Gemma."
    assert troubled.index(warning) < troubled.index("<h1>")
    assert warning not in _written(_results(seeds=(0,)) | {"is_demo": False}, tmp_path).read_text()


def test_unfinished_study_says_what_is_missing(tmp_path: Path) -> None:
    results = _results(arms=("full", "no-contrast"))
    results["missing"] = ["no-contrast seed 0 layer 2", "no-contrast seed 1 layer 2"]
    results = _with_rows(results, [row for row in results["rows"] if row["arm"] == "full"])
    text = _written(results, tmp_path).read_text()
    assert "2 of its SAEs are not evaluated yet: no-contrast seed 0 layer 2, no-contrast seed 1 layer 2." in text
    assert "not evaluated yet</td>" in _table_row(text, "no-contrast")


def test_every_sae_degenerate_still_makes_a_page(tmp_path: Path) -> None:
    results = _results() | {"curves": []}
    results = _with_rows(results, [_degenerate(row) for row in results["rows"]])
    text = _written(results, tmp_path).read_text()
    _Page(text)
    assert "<svg" not in text


def test_same_results_give_the_same_bytes(report: Path, tmp_path: Path) -> None:
    write_report(_troubled(), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "differences.csv",
        "index.html",
        "results.csv",
        "results.json",
    ]
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (report / path.name).read_bytes()


def test_json_and_csv_hold_the_results_unrounded(report: Path) -> None:
    results = _troubled()
    assert json.loads((report / "results.json").read_text()) == results
    with (report / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(results["rows"])
    for line, row in zip(lines, results["rows"], strict=True):
        assert None not in line
        assert None not in line.values()
        if row["degenerate"]:
            assert line["degenerate"] == DEGENERATE
            assert line["fvu"] == line["sparse_probing_1"] == line["bpcr_union"] == ""
            continue
        assert (line["arm"], int(line["seed"]), int(line["tokens"])) == (row["arm"], row["seed"], row["tokens"])
        assert float(line["fvu"]) == row["fvu"]
        assert {k: float(line[f"sparse_probing_{k}"]) for k in row["sparse_probing"]} == row["sparse_probing"]
        assert float(line["llm_probing_all"]) == row["llm_probing"]["all"]
        for task, accuracies in row["sparse_probing_by_task"].items():
            assert float(line[f"sparse_probing_by_task_{task}_20"]) == accuracies["20"]
        for section in ("bpcr", "loss"):
            for name, value in row[section].items():
                if not isinstance(value, list):
                    assert line[f"{section}_{name}"] == ("" if value is None else str(value))
        for name, value in row["interference"]["fixed"].items():
            assert float(line[f"interference_fixed_{name}"]) == value


def test_csv_columns_do_not_depend_on_the_rows(report: Path, tmp_path: Path) -> None:
    results = _results() | {"curves": []}
    results = _with_rows(results, [_degenerate(results["rows"][0])])
    write_report(results, tmp_path)
    headers = [(folder / "results.csv").read_text().splitlines()[0] for folder in (report, tmp_path)]
    assert headers[0] == headers[1]


def test_nan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        _written(_results() | {"k_values": [math.nan]}, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("ks", "titles"), [([2, 5], ["top 2", "top 5"]), ([5], ["top 5"]), ([1, 2, 5], ["top 1", "top 5"])])
def test_the_terminal_shows_the_smallest_and_the_largest_probe(ks: list[int], titles: list[str]) -> None:
    results = _results()
    results["k_values"] = ks
    for row in results["rows"]:
        for of in ("sparse_probing", "llm_probing"):
            row[of] = {k: value for k, value in row[of].items() if k in [*map(str, ks), "all"]}
    table = results_table(results)
    assert [column.header for column in table.columns][3:-3] == titles
    assert "the model" in list(table.columns[0].cells)
