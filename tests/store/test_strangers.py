"""A store of a stranger is data: what it says of itself is bounded before memory or time is spent on it."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_store import SHARD_ROWS, filled, new_store, numbered, shard_rows
from typer.testing import CliRunner

from pipeline.artefacts.identity import sealed, sha256
from pipeline.artefacts.manifest import MANIFEST, Artefact
from pipeline.artefacts.storage import LocalStorage
from pipeline.artefacts.workspace import Workspace
from pipeline.cli import app
from pipeline.errors import CorruptArtefactError, PipelineError
from pipeline.extract import fill
from pipeline.store import format as fmt
from pipeline.store.documents import Documents
from pipeline.store.reader import ActivationStore
from pipeline.store.writer import ShardWriter

HUGE = 10**15


def finished(root: Path) -> Path:
    artefact, workspace = Artefact(kind="stores", label="small", inputs={}), Workspace(root)
    filled(workspace.folder(artefact), numbered(3 * SHARD_ROWS))
    fill.publish(artefact, workspace, 0.0)
    return workspace.folder(artefact)


def edit(folder: Path, name: str, change: Callable[[Any], object]) -> None:
    """Change a file, and what vouches for it."""
    value = json.loads((folder / name).read_text())
    change(value)
    content = json.dumps(sealed(value) if "seal" in value else value).encode()
    (folder / name).write_bytes(content)
    if name != MANIFEST:
        record = {"bytes": len(content), "sha256": sha256(content)}
        edit(folder, MANIFEST, lambda manifest: manifest["files"].update({name: record}))


def attribute(**values: object) -> Callable[[Any], object]:
    """Change the layout, of which a stranger's seal would be true; an earlier version's has none."""
    return lambda root: (root["attributes"].update(values), root["attributes"].pop("seal", None))


@pytest.mark.parametrize(
    "values",
    [
        {"rows": HUGE}, {"rows": -5}, {"rows": 0}, {"rows": 1.5}, {"shard_rows": 0}, {"shard_rows": HUGE}, {"chunk_rows": 0},
        {"chunk_rows": HUGE}, {"d_in": HUGE}, {"d_in": 0}, {"d_in": -1}, {"layers": []}, {"layers": list(range(200_000))},
        {"special_ids": list(range(1_000_000))}, {"dtype": "object"}, {"seed": -1}, {"format": "../../x"},
        {"max_norm": float("nan")}, {"rows": 2**40, "shard_rows": 64}, {"d_in": 2**39},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_numbers_of_a_layout_end_at_once_in_one_line(tmp_path: Path, values: dict[str, Any]) -> None:
    folder = finished(tmp_path)
    edit(folder, "zarr.json", attribute(**values))
    with pytest.raises(CorruptArtefactError):
        ActivationStore(folder, partial=True)
    for command in (["info"], ["verify"], ["verify", "--deep"]):
        result = CliRunner().invoke(app, ["store", *command, str(folder)])
        assert result.exit_code == 1
        assert result.exception is None or isinstance(result.exception, PipelineError | SystemExit)


def norms(**values: object) -> Callable[[Any], object]:
    return lambda commit: commit["norms"]["3"].update(values)


@pytest.mark.parametrize(
    "change",
    [
        lambda commit: commit["files"].update({"../../../etc/passwd": {"bytes": 1, "crc32c": 1}}),
        lambda commit: commit["files"].clear(),
        lambda commit: commit["norms"].clear(),
        lambda commit: commit.update(rows=HUGE),
        lambda commit: commit.update(rows=-3),
        lambda commit: commit.update(rows=0),
        lambda commit: commit.update(shard=2),
        lambda commit: commit["files"]["layer_03/c/1/0"].update(bytes=HUGE),
        lambda commit: commit["files"]["layer_03/c/1/0"].update(chunks="x"),
        norms(sum_squares=float("nan")),
        norms(sum_squares=float("inf")),
        norms(sum_squares=-1.0),
        norms(massive=-1),
    ],
)
@pytest.mark.filterwarnings("error")
def test_impossible_commits_are_refused(tmp_path: Path, change: Callable[[Any], object]) -> None:
    folder = finished(tmp_path)
    path = folder / "commits/000001.json"
    value = json.loads(path.read_text())
    change(value)
    value.pop("seal")
    content = json.dumps(value).encode()
    path.write_bytes(content)
    record = {"bytes": len(content), "sha256": sha256(content)}
    edit(folder, MANIFEST, lambda manifest: manifest["files"].update({"commits/000001.json": record}))
    with pytest.raises(CorruptArtefactError):
        ActivationStore(folder)
    assert CliRunner().invoke(app, ["store", "verify", str(folder)]).exit_code == 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("tokens", lambda array: array.update(shape=[10**12, 192])),
        ("tokens", lambda array: array.update(shape=[-1, 192])),
        ("tokens", lambda array: array["chunk_grid"]["configuration"].update(chunk_shape=[10**10, 192])),
        ("row_offsets", lambda array: array.update(shape=[10**13])),
        ("doc_starts", lambda array: array["chunk_grid"]["configuration"].update(chunk_shape=[0])),
        ("layer_03", lambda array: array["codecs"][0]["configuration"].update(chunk_shape=[0, 8])),
        ("layer_03", lambda array: array["codecs"][0]["configuration"].update(chunk_shape=[1, 8])),
        ("layer_03", lambda array: array["chunk_grid"]["configuration"].update(chunk_shape=[10**13, 8])),
        ("layer_03", lambda array: array.update(shape=[192, 10**9])),
        ("layer_03", lambda array: array.update(data_type="float64")),
        ("layer_03", lambda array: array.update(data_type="object")),
        ("layer_03", lambda array: array.update(codecs=[{"name": "nonsense"}])),
        ("layer_03", lambda array: array.update(codecs=7)),
        ("layer_03", lambda array: array.clear()),
    ],
)
def test_arrays_that_do_not_fit_the_layout_are_refused(tmp_path: Path, name: str, change: Callable[[Any], object]) -> None:
    folder = finished(tmp_path)
    edit(folder, f"{name}/zarr.json", change)
    store = ActivationStore(folder)
    with pytest.raises(CorruptArtefactError):
        store.read(3, 0, 100) if name == "layer_03" else store.whole(name)
    if name != "layer_03":
        with pytest.raises(CorruptArtefactError):
            store.array(name).read(0, len(store.array(name)))
    result = CliRunner().invoke(app, ["store", "verify", "--deep", str(folder)])
    assert isinstance(result.exception, SystemExit | PipelineError) or result.exception is None


@pytest.mark.parametrize("place", ["../../../../etc/passwd", "/etc/passwd"])
def test_a_manifest_that_names_files_elsewhere_is_refused(tmp_path: Path, place: str) -> None:
    folder = finished(tmp_path)
    content = Path("/etc/passwd").read_bytes()
    record = {"bytes": len(content), "sha256": sha256(content)}
    edit(folder, MANIFEST, lambda manifest: manifest["files"].update({place: record}))
    with pytest.raises(CorruptArtefactError):
        ActivationStore(folder)
    assert CliRunner().invoke(app, ["store", "verify", str(folder)]).exit_code == 1


def test_what_a_store_says_is_shown_as_it_is_and_cut(tmp_path: Path) -> None:
    new = new_store(SHARD_ROWS, provenance={"text": "[/bold]" + "x" * 10_000}, special_ids=tuple(range(60_000)))
    folder = tmp_path / "[/x]"
    storage = LocalStorage(folder)
    fmt.create(storage, new)
    ShardWriter(storage).write(0, shard_rows(numbered(SHARD_ROWS)))
    result = CliRunner().invoke(app, ["store", "info", str(folder)])
    assert result.exit_code == 0
    assert "[/bold]" in result.output
    assert "and 59,744 more" in result.output
    assert len(result.output) < 20_000


def test_a_store_of_zeros_has_no_scale(tmp_path: Path) -> None:
    store = filled(tmp_path, numbered(SHARD_ROWS) * 0)
    with pytest.raises(PipelineError, match="all rows of layer 3 are zero"):
        store.scale(3)
    assert np.isfinite(store.read(3, 0, 5).float()).all()


@pytest.mark.parametrize(
    ("label", "offsets"),
    [([0, 1, 0], [0, 20, 40, 64]), ([0, 0, 0], [0, 20, 40, 64]), ([0, 0, 1], [0, 40, 20, 64]), ([0, 0, 1], [0, 20, 40, 80])],
)
def test_labels_and_documents_that_do_not_fit_are_refused(tmp_path: Path, label: list[int], offsets: list[int]) -> None:
    new = new_store(SHARD_ROWS, row_order="document", classes=("one", "two"))
    sequences = fmt.Sequences(
        tokens_SL=np.zeros((3, 128), np.int32), row_offsets=np.array(offsets), doc_starts=np.arange(3) * 128
    )
    labels = fmt.Labels(label=np.array(label, np.int32), split=np.zeros(3, np.uint8))
    fmt.create(LocalStorage(tmp_path), fmt.NewStore(layout=new.layout, sequences=sequences, labels=labels))
    ShardWriter(LocalStorage(tmp_path)).write(0, shard_rows(numbered(SHARD_ROWS)))
    with pytest.raises(CorruptArtefactError, match=r"documents (do not fit its rows|of class '(one|two)' are amiss)"):
        list(Documents(ActivationStore(tmp_path), 3).padded("train", 2))


def test_a_fifo_for_the_layout_or_a_shard_is_not_waited_for(tmp_path: Path) -> None:
    folder = finished(tmp_path)
    for name in ("layer_03/c/1/0", "zarr.json"):
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(CorruptArtefactError):
            ActivationStore(folder)


def test_a_sweep_passes_over_what_its_writer_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".x.1.partial").touch()
    (tmp_path / ".x.2.partial").touch()
    unlink = Path.unlink

    def twice(path: Path, missing_ok: bool = False) -> None:
        unlink(path)
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", twice)
    LocalStorage(tmp_path).sweep()
    assert list(tmp_path.iterdir()) == []
