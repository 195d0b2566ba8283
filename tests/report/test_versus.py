"""Two studies side by side: what is compared, what is not, and what the page says of it."""

import csv
import re
from pathlib import Path
from typing import Any

import pytest
from small_results import compared, results_of, row

from pipeline.errors import BadInputError
from pipeline.report.results import Model, Results
from pipeline.report.versus import COLUMNS, Comparison, Line, compare, write_comparison


def study(name: str, store: str = "aaa", training: dict[str, Any] | None = None, **arms: list[float]) -> Results:
    """A study of one layer; per arm the accuracies of its seeds."""
    rows = [
        row(
            arm.replace("_", "-"),
            seed,
            fvu=0.1,
            l0=20.0,
            sparse_probing={"1": value, "all": 0.9},
            sparse_probing_by_task={"<b>easy</b>": {"1": value, "all": 0.9}},
        )
        for arm, values in arms.items()
        for seed, value in enumerate(values)
    ]
    return results_of(rows, experiment=name, store=store, tasks=("<b>easy</b>",), training=training)


A = study("first", full=[0.70, 0.72], no_contrast=[0.68, 0.69], magnitude=[0.7, 0.7])
B = study("second", full=[0.80, 0.82], no_contrast=[0.79, 0.80], baseline=[0.6, 0.6])


def line(comparison: Comparison, arm: str) -> Line:
    (found,) = [one for one in comparison.lines if (one.arm, one.metric) == (arm, "sparse_probing_1")]
    return found


def test_shared_arms_stand_side_by_side_with_each_study_s_own_difference() -> None:
    comparison = compare(A, B)
    assert {one.arm for one in comparison.lines} == {"full", "no-contrast"}
    assert (comparison.only_a, comparison.only_b) == (("magnitude",), ("baseline",))
    found = line(comparison, "no-contrast")
    assert found.mean_a == pytest.approx(0.685)
    assert found.mean_b == pytest.approx(0.795)
    assert found.level_difference == pytest.approx(0.11)
    assert found.difference_a == pytest.approx(-0.025)
    assert found.difference_b == pytest.approx(-0.015)
    assert found.low_a is not None
    assert found.high_a is not None
    assert found.low_a < found.difference_a < found.high_a


def test_settings_that_differ_come_first() -> None:
    other = study("second", training={"l1": 0.08, "resets": None}, full=[0.80, 0.82])
    settings = compare(A, other).settings
    assert [one.same for one in settings] == sorted(one.same for one in settings)
    differing = {one.name for one in settings if not one.same}
    assert differing == {"recipe: l1", "recipe: resets every", "recipe: resets first"}


def test_levels_are_compared_only_on_the_same_activations(tmp_path: Path) -> None:
    same = Path(write_comparison(A, B, tmp_path / "same")).read_text()
    assert "Both studies read the same activations" in same
    assert "second − first" in same
    other = Path(write_comparison(A, study("second", "bbb", full=[0.8, 0.82]), tmp_path / "other")).read_text()
    assert "The activations differ" in other
    assert "second − first" not in other
    model = study("second", "bbb", full=[0.8, 0.82]).model_copy(update={"model": Model(name="another", facts={"depth": 4})})
    assert "The models differ" in Path(write_comparison(A, model, tmp_path / "model")).read_text()


def test_page_is_one_file_that_escapes_and_warns(tmp_path: Path) -> None:
    text = Path(write_comparison(A, B.model_copy(update={"is_demo": True}), tmp_path)).read_text()
    assert text.index("nothing here says anything about Gemma") < text.index("<h1>")
    assert "<b>" not in text
    assert "&lt;b&gt;text&lt;/b&gt;" in text
    assert "http" not in text
    assert "<th>" not in text
    assert text.count("<table") == text.count("<caption")
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'aria-labelledby="([^"]*)"', text)) <= set(ids)


def test_json_and_csv_hold_every_line(tmp_path: Path) -> None:
    write_comparison(A, B, tmp_path)
    comparison = compare(A, B)
    assert Comparison.model_validate_json((tmp_path / "comparison.json").read_text()) == comparison
    with (tmp_path / "comparison.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        lines = list(reader)
    assert reader.fieldnames == COLUMNS
    assert [one["arm"] for one in lines] == [one.arm for one in comparison.lines]
    assert [float(one["mean_b"]) for one in lines] == [one.mean_b for one in comparison.lines]


def test_studies_without_a_common_arm_are_refused() -> None:
    with pytest.raises(BadInputError, match="first and other have no arm in common"):
        compare(A, study("other", baseline=[0.5, 0.6]))


def test_layers_that_are_not_shared_are_paired_in_order_and_named(tmp_path: Path) -> None:
    other = study("second", "bbb", full=[0.8, 0.82], no_contrast=[0.7, 0.7])
    other = compared(other, rows=tuple(one.model_copy(update={"layer": 12}) for one in other.rows))
    assert compare(A, other).layers == ((2, 12),)
    assert "layer 2 beside layer 12" in Path(write_comparison(A, other, tmp_path)).read_text()
