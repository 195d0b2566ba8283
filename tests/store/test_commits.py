"""What a commit vouches for: which chunks a file has, and numbers that nobody changed."""

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import pytest
import torch
from small_store import SHARD_ROWS, filled, new_store, numbered, shard_rows

from pipeline.artefacts.identity import SEAL, sealed
from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.storage import LocalStorage
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import CorruptArtefactError, PipelineError
from pipeline.extract import fill
from pipeline.store import format as fmt
from pipeline.store.norms import massive_rows, store_facts
from pipeline.store.reader import ActivationStore
from pipeline.store.text_arrays import read_whole
from pipeline.store.verify import damages
from pipeline.store.writer import ShardWriter

ROWS = 3 * SHARD_ROWS


def finished(root: Path, values_RD: torch.Tensor, **changes: object) -> tuple[Artefact, Workspace, Path]:
    """A published store with these rows at layer 3."""
    artefact = Artefact(kind="stores", label="small", inputs={"rows": len(values_RD)})
    workspace = Workspace(root)
    folder = workspace.folder(artefact)
    filled(folder, values_RD, provenance=dict(artefact.inputs), **changes)
    fill.publish(artefact, workspace, 0.0)
    return artefact, workspace, folder


def edit(path: Path, change: Callable[[Any], object], seal: bool = False) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(sealed(value) if seal else value))


def found(folder: Path, *, deep: bool = False) -> list[str]:
    return [damage.file for damage in damages(LocalStorage(folder), deep=deep)]


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


@pytest.mark.parametrize("codec", ["raw", "blosc"])
def test_another_sound_shard_in_a_shard_s_place_is_refused_found_and_made_again(tmp_path: Path, codec: str) -> None:
    values_RD = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    artefact, workspace, folder = finished(tmp_path / "ws", values_RD, codec=codec)
    other = finished(tmp_path / "other", values_RD * 2, codec=codec)[2]
    pristine = {path: path.read_bytes() for path in folder.rglob("c/*/0")}
    layer = folder / "layer_03/c"
    harms: dict[str, Callable[[], object]] = {
        "two shards swapped": lambda: swap(layer / "0/0", layer / "1/0"),
        "the shard of another store": lambda: shutil.copy(other / "layer_03/c/1/0", layer / "1/0"),
    }
    for harm in harms.values():
        harm()
        if any(path.stat().st_size != len(content) for path, content in pristine.items()):
            expected = "bytes instead of"  # compressed
        else:
            expected = r"layer_03/c/\d/0: (chunk 0|index) is not the one that was committed; repair it with"
        with pytest.raises(CorruptArtefactError, match=expected):
            ActivationStore(folder).read(3, SHARD_ROWS, 2 * SHARD_ROWS)
        assert "layer_03/c/1/0" in found(folder, deep=True)
        assert not fill.mend(artefact, workspace, deep=True)
        lost = ShardWriter(workspace.storage(artefact)).missing()
        assert 1 in lost
        for path, content in pristine.items():
            path.write_bytes(content)
        shutil.rmtree(folder)
        finished(tmp_path / "ws", values_RD, codec=codec)


def test_chunks_swapped_inside_a_shard_are_refused(tmp_path: Path) -> None:
    filled(tmp_path, numbered(ROWS))
    path = tmp_path / "layer_03/c/1/0"
    content, size = path.read_bytes(), 16 * 8 * 2 + 4
    path.write_bytes(content[size : 2 * size] + content[:size] + content[2 * size :])
    with pytest.raises(CorruptArtefactError, match="chunk 0 is not the one that was committed"):
        ActivationStore(tmp_path).read(3, SHARD_ROWS, 2 * SHARD_ROWS)
    assert found(tmp_path, deep=True) == ["layer_03/c/1/0"]


def test_commits_without_the_new_fields_are_as_good_as_ever(tmp_path: Path) -> None:
    values_RD = numbered(ROWS)
    filled(tmp_path, values_RD)

    def older(commit: dict[str, Any]) -> None:
        del commit[SEAL]
        for check in commit["files"].values():
            del check["chunks"]
        for norms in commit["norms"].values():
            del norms["massive_squares"]

    for path in (tmp_path / "commits").iterdir():
        edit(path, older)
    assert torch.equal(ActivationStore(tmp_path).read(3, 0, ROWS), values_RD)
    assert found(tmp_path, deep=True) == []
    store = ActivationStore(tmp_path)
    assert list(massive_rows(store_facts(store.layout, store.commits))) == []


@pytest.mark.parametrize("value", ["sum_squares", "median"])
def test_an_edited_commit_of_an_unfinished_store_is_refused_and_made_again(tmp_path: Path, value: str) -> None:
    artefact, workspace, folder = finished(tmp_path, numbered(ROWS))
    (folder / "manifest.json").unlink()
    edit(folder / "commits/000001.json", lambda commit: commit["norms"]["3"].update({value: 5.0}))
    with pytest.raises(CorruptArtefactError, match=r"commits/000001\.json was changed after it was written; repair it with"):
        ActivationStore(folder)
    assert found(folder) == ["commits/000001.json"]
    assert not fill.mend(artefact, workspace)
    assert ShardWriter(workspace.storage(artefact)).missing() == [1]


def test_deep_compares_norms_with_the_rows_even_where_a_seal_fits(tmp_path: Path) -> None:
    filled(tmp_path, numbered(ROWS))
    edit(tmp_path / "commits/000001.json", lambda commit: commit["norms"]["3"].update(sum_squares=5.0), seal=True)
    assert found(tmp_path) == []
    assert found(tmp_path, deep=True) == ["commits/000001.json"]


@pytest.mark.parametrize(
    "change",
    [
        lambda facts: facts["scales"].update({"3": 7.0}),
        lambda facts: facts.update(rows=5),
        lambda facts: facts["norms"]["3"].update(rms=7.0),
    ],
)
def test_facts_of_a_manifest_are_those_of_its_commits(tmp_path: Path, change: Callable[[Any], object]) -> None:
    artefact, workspace, folder = finished(tmp_path, numbered(ROWS))
    facts = json.loads((folder / "manifest.json").read_text())["facts"]
    edit(folder / "manifest.json", lambda manifest: change(manifest["facts"]))
    assert found(folder) == ["manifest.json"]
    assert not fill.mend(artefact, workspace)
    assert ShardWriter(workspace.storage(artefact)).missing() == []
    fill.publish(artefact, workspace, 0.0)
    assert json.loads((folder / "manifest.json").read_text())["facts"] == facts


def test_a_repair_killed_half_way_publishes_nothing_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class KilledError(BaseException):
        pass

    def older(commit: dict[str, Any]) -> None:
        del commit[SEAL]
        commit["norms"]["3"]["sum_squares"] *= 2

    delete = LocalStorage.delete
    for allowed in range(4):
        artefact, workspace, folder = finished(tmp_path / str(allowed), numbered(ROWS))
        edit(folder / "commits/000000.json", older)
        edit(folder / "commits/000001.json", older)
        left = allowed

        def dying(self: LocalStorage, name: str) -> None:
            nonlocal left
            if not left:
                raise KilledError
            left -= 1
            delete(self, name)

        with monkeypatch.context() as killing:
            killing.setattr(LocalStorage, "delete", dying)
            if allowed < 3:
                with pytest.raises(KilledError):
                    fill.mend(artefact, workspace, deep=True)
            else:
                fill.mend(artefact, workspace, deep=True)
        fill.mend(artefact, workspace)  # not deep
        assert ShardWriter(workspace.storage(artefact)).missing() == [0, 1]


@pytest.mark.parametrize("where", ["layer_03", "commits"])
def test_what_cannot_be_listed_is_not_taken_for_lost(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    artefact, workspace, folder = finished(tmp_path, numbered(ROWS))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    scandir = os.scandir

    def failing(path: Any = ".") -> Any:
        if str(path).endswith(where):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    for deep in (False, True):
        with suppress(PipelineError, PermissionError):
            fill.mend(artefact, workspace, deep=deep)
        assert {path: path.read_bytes() for path in before if path.exists()} == before


@pytest.mark.parametrize("name", ["label", "split", "tokens", "doc_starts"])
def test_an_edited_array_with_right_checksums_is_refused(tmp_path: Path, name: str) -> None:
    artefact = Artefact(kind="probes", label="small", inputs={})
    workspace = Workspace(tmp_path)
    folder = workspace.folder(artefact)
    new = new_store(SHARD_ROWS, classes=("one", "two"), provenance={})
    zeros = np.zeros(9, dtype=np.int32)
    labels = fmt.Labels(label=zeros, split=zeros.astype(np.uint8))
    fmt.create(workspace.storage(artefact), dataclasses.replace(new, labels=labels))
    ShardWriter(workspace.storage(artefact)).write(0, shard_rows(numbered(SHARD_ROWS)))
    fill.publish(artefact, workspace, 0.0)
    before = ActivationStore(folder).whole(name)
    (path,) = [path for path in folder.glob(f"{name}/c/**/*") if path.is_file()]
    zstd = numcodecs.Zstd(level=1)
    edited = bytearray(zstd.decode(path.read_bytes()[:-4]))
    edited[0] += 1
    content = zstd.encode(bytes(edited))
    path.write_bytes(content + int(google_crc32c.value(content)).to_bytes(4, "little"))
    assert (read_whole(LocalStorage(folder), name) != before).any()  # nothing but the manifest knows
    for read in (ActivationStore.whole, lambda store, name: store.array(name).read(0, 1)):
        with pytest.raises(CorruptArtefactError, match=f"{name}/c/.* (does not match its checksum|bytes instead of)"):
            read(ActivationStore(folder), name)
