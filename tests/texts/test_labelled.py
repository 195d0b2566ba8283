"""Labelled texts in folders: what is drawn from them, what they are called, and what is refused."""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_study import SMALL, Study

from pipeline.artefacts.identity import fingerprint
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError
from pipeline.extract.extraction import extract
from pipeline.runtime.compatibility import importing_sae_bench
from pipeline.store.documents import Documents
from pipeline.store.reader import ActivationStore
from pipeline.study.experiment import Experiment
from pipeline.study.plan import Plan, make_plan
from pipeline.texts.files import probe_fingerprint, probe_texts
from pipeline.texts.labelled import load_texts
from pipeline.texts.text_sections import SAE_BENCH_DATASETS, ProbesConfig

AG_NEWS = Path(__file__).parents[3] / "shared" / "data" / "probes" / "ag_news"
CLASSES = ("poem", "code", "law")


def write(folder: Path, part: str, **columns: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{part}.parquet")


def write_set(folder: Path, classes: tuple[Any, ...] = CLASSES, train: int = 20, test: int = 10) -> Path:
    """A data set with so many texts a class, no two of them equal."""
    for part, count in (("train", train), ("test", test)):
        rows = [(f"{part} text {n} of class {name}, long enough to be one", name) for n in range(count) for name in classes]
        write(folder, part, text=[text for text, _ in rows], label=[label for _, label in rows])
    return folder


def texts(folder: Path, seed: int = 42, train_size: int = 16, test_size: int = 8) -> Any:
    probes = ProbesConfig(datasets=(str(folder),), train_size=train_size, test_size=test_size, seed=seed)
    return load_texts(folder.name, probes)


def test_every_class_has_half_of_each_size_and_nothing_else_decides(tmp_path: Path) -> None:
    train, test = texts(write_set(tmp_path / "kinds"))
    assert list(train) == list(test) == sorted(CLASSES)
    for name in CLASSES:
        assert [len(set(train[name])), len(set(test[name]))] == [8, 4]
        assert all(text.startswith("train") and f"class {name}," in text for text in train[name])
        assert all(text.startswith("test") and f"class {name}," in text for text in test[name])
    elsewhere = write_set(tmp_path / "elsewhere" / "kinds", classes=CLASSES[::-1])
    assert texts(elsewhere) == (train, test)
    assert texts(elsewhere, seed=1) != (train, test)


def test_whole_numbers_are_labels_in_their_own_order(tmp_path: Path) -> None:
    assert list(texts(write_set(tmp_path / "numbers", classes=(10, 9, 2)))[0]) == ["2", "9", "10"]


def test_texts_without_a_visible_character_are_left_out(tmp_path: Path) -> None:
    folder = write_set(tmp_path / "kinds")
    blank, kept = ["", " \n"], list("abcd")
    write(folder, "train", text=(blank + kept) * 2, label=["poem"] * 6 + ["code"] * 6)
    write_set(tmp_path / "test", classes=("poem", "code"))
    (tmp_path / "test" / "test.parquet").rename(folder / "test.parquet")
    train, _ = texts(folder, train_size=8)
    assert {name: sorted(of_class) for name, of_class in train.items()} == {"code": kept, "poem": kept}
    with pytest.raises(BadInputError, match=r"kinds: class 'code' has 4 texts for the train set, 5 were asked for"):
        texts(folder, train_size=10)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["a"], "kind": ["x"]}, r"train.parquet has no column 'label'; its columns are text, kind$"),
        ({"text": ["a"], "label": ["poem"]}, r"train.parquet has 1 classes, a probe needs two$"),
        ({"text": ["a", "b", "c", "d"], "label": ["poem", "code", "law", "cook"]}, r"class 'cook' is in only one of"),
        ({"text": ["a", "b"], "label": ["poem", "code"]}, r"class 'law' is in only one of train.parquet and test.parquet$"),
        ({"text": ["a", None], "label": ["poem", "code"]}, r"train.parquet row 2: expected text, found NoneType$"),
        ({"text": ["a", "b"], "label": ["poem", None]}, r"train.parquet row 2: label is NoneType, neither text nor a"),
        ({"text": ["a", "b"], "label": [0.5, 1.0]}, r"train.parquet row 1: label is float, neither text nor a"),
    ],
)
def test_what_is_no_data_set_is_refused(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    folder = write_set(tmp_path / "kinds")
    write(folder, "train", **columns)
    with pytest.raises(BadInputError, match=message):
        texts(folder)


def plan_with(path: Path, *datasets: Path | str) -> Plan:
    """The plan of the small study with other probe data sets."""
    declared = ", ".join(f'"{dataset}"' for dataset in datasets)
    path.write_text(SMALL.replace('"python/text-kind", "python/docstring-of"', declared))
    return make_plan(Experiment.load(str(path)))


def test_a_folder_goes_by_its_name_and_counts_by_content(tmp_path: Path) -> None:
    toml = tmp_path / "small.toml"
    folder = write_set(tmp_path / "kinds")
    before = plan_with(toml, folder, "python/text-kind").probes
    assert list(before) == ["kinds", "python/text-kind"]
    assert before["kinds"].label == "kinds-tiny-gemma2"
    assert str(tmp_path) not in str(before["kinds"].inputs)
    moved = write_set(tmp_path / "elsewhere" / "kinds")
    assert plan_with(toml, moved).probes["kinds"].key == before["kinds"].key
    write_set(moved, test=11)
    assert plan_with(toml, moved).probes["kinds"].key != before["kinds"].key


def test_data_sets_that_reports_could_not_tell_apart_are_refused(tmp_path: Path) -> None:
    one, other = write_set(tmp_path / "one" / "kinds"), write_set(tmp_path / "other" / "kinds")
    toml = tmp_path / "small.toml"
    with pytest.raises(BadInputError, match=rf"probes: datasets: {one} and {other} are both called 'kinds' in reports"):
        plan_with(toml, one, other)
    with pytest.raises(BadInputError, match=r"are both called 'python/text-kind' in reports; rename or remove one$"):
        plan_with(toml, "python/text-kind", "python/text-kind")


def test_an_unknown_data_set_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for unknown in (tmp_path / "empty", "python/text-kinds"):
        with pytest.raises(BadInputError, match=r"is neither a folder with train.parquet and test.parquet nor one of LabHC"):
            plan_with(tmp_path / "small.toml", unknown)
    (write_set(tmp_path / "half") / "test.parquet").unlink()
    with pytest.raises(BadInputError, match=r"half cannot be read: .*test.parquet"):
        plan_with(tmp_path / "small.toml", tmp_path / "half")


def test_the_known_data_sets_are_those_that_the_others_have() -> None:
    with importing_sae_bench():
        from sae_bench.sae_bench_utils.dataset_info import chosen_classes_per_dataset
    assert set(SAE_BENCH_DATASETS) == set(chosen_classes_per_dataset)


def test_a_folder_becomes_a_probe_store(study: Study, tmp_path: Path) -> None:
    folder = write_set(tmp_path / "kinds", train=50, test=30)
    plan = plan_with(tmp_path / "small.toml", folder)
    workspace = Workspace(tmp_path / "workspace")
    shutil.copytree(study.workspace.root, workspace.root)
    assert extract(plan, workspace) == [plan.probes["kinds"]]
    documents = Documents(ActivationStore(workspace.folder(plan.probes["kinds"])), 2)
    train, test = dict(documents.padded("train", 40)), dict(documents.padded("test", 40))
    assert {name: len(x_SLD) for name, x_SLD in train.items()} == dict.fromkeys(sorted(CLASSES), 40)
    assert {name: len(x_SLD) for name, x_SLD in test.items()} == dict.fromkeys(sorted(CLASSES), 20)


@pytest.mark.skipif(not AG_NEWS.is_dir(), reason="the shared real texts are not here")
def test_real_news_are_read() -> None:
    train, test = texts(AG_NEWS, train_size=3000, test_size=1000)
    assert list(train) == list(test) == ["Business", "Sci/Tech", "Sports", "World"]
    assert {len(of_class) for of_class in train.values()} == {1500}
    assert {len(of_class) for of_class in test.values()} == {500}


def test_repeated_texts_are_left_out_told_and_change_the_fingerprint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder, "train", text=["a", "a", "a", "b", "c", "d", "t"], label=[0, 0, 0, 0, 1, 1, 0])
    write(folder, "test", text=["t", "u"], label=[0, 1])
    train, test = probe_texts(folder, 2, 1, 42)
    assert {label: sorted(texts) for label, texts in train.items()} == {"0": ["a", "b"], "1": ["c", "d"]}
    assert test == {"0": ["t"], "1": ["u"]}
    assert "3 repeated texts are left out" in capsys.readouterr().err
    parts = ((f"{part}.parquet", folder / f"{part}.parquet") for part in ("train", "test"))
    assert probe_fingerprint(folder) != fingerprint(parts)


def test_test_texts_that_are_the_training_texts_are_refused(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write(tmp_path, part, text=["a", "b"], label=[0, 1])
    with pytest.raises(BadInputError, match="holds the texts of train"):
        probe_texts(tmp_path, 1, 1, 42)


def test_a_text_with_two_labels_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, "train", text=["a", "a"], label=[0, 1])
    write(tmp_path, "test", text=["c", "d"], label=[0, 1])
    probe_texts(tmp_path, 1, 1, 42)
    assert "train.parquet: 1 texts have a second label" in capsys.readouterr().err


def test_repeated_texts_of_known_data_sets_are_counted_and_stay(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {"a": ["one", "one", "two"], "b": ["three", "four"]}, {"a": ["two"], "b": ["five"]}
    monkeypatch.setattr("pipeline.texts.python.probe_texts", lambda *_: texts)
    probes = ProbesConfig(datasets=("python/text-kind",))
    assert load_texts("python/text-kind", probes) == texts
    said = capsys.readouterr().err
    assert said.startswith("python/text-kind: 1 texts are drawn more than once within a class, and 1 test texts are also")
