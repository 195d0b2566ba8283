import json
import multiprocessing
import resource
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artefacts.manifest import MANIFEST, Artefact
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError, CorruptArtefactError, MissingArtefactError, PipelineError, StorageError


def artefact(label: str = "thing", **inputs: object) -> Artefact:
    return Artefact(kind="saes", label=label, inputs={"format": 1, **inputs})


def publish(workspace: Workspace, thing: Artefact, parents: tuple[Artefact, ...] = ()) -> None:
    with workspace.lock(thing) as folder:
        (folder / "data.bin").write_bytes(b"12345")
        workspace.publish(thing, parents=workspace.fingerprints(parents), facts={"n": 5})


def test_an_artefact_exists_when_its_manifest_does(tmp_path: Path) -> None:
    workspace, thing = Workspace(tmp_path / "ws"), artefact()
    assert workspace.manifest(thing) is None
    with workspace.lock(thing) as folder:
        (folder / "data.bin").write_bytes(b"12345")
        assert workspace.manifest(thing) is None
        workspace.publish(thing, facts={"n": 5})
    manifest = workspace.manifest(thing)
    assert manifest is not None
    assert manifest.key == thing.key
    assert manifest.facts == {"n": 5}
    assert list(manifest.files) == ["data.bin"]
    assert manifest.versions["torch"]
    assert not list(folder.glob(".*partial"))


def test_a_changed_artefact_is_never_taken_for_a_whole_one(tmp_path: Path) -> None:
    workspace, thing = Workspace(tmp_path), artefact()
    publish(workspace, thing)
    data = workspace.folder(thing) / "data.bin"
    data.write_bytes(b"54321")
    with pytest.raises(CorruptArtefactError, match=r"data\.bin was changed after it was made; delete"):
        workspace.verified(thing, "data.bin")
    data.write_bytes(b"1234")
    with pytest.raises(CorruptArtefactError, match="has 4 bytes instead of 5"):
        workspace.manifest(thing)
    data.unlink()
    with pytest.raises(CorruptArtefactError, match=r"data\.bin is missing"):
        workspace.manifest(thing)
    (workspace.folder(thing) / MANIFEST).write_text("{")
    with pytest.raises(CorruptArtefactError, match="cannot be read"):
        workspace.manifest(thing)


def test_an_artefact_of_another_experiment_is_refused(tmp_path: Path) -> None:
    workspace, thing, other = Workspace(tmp_path), artefact(), artefact(n=2)
    publish(workspace, other)
    workspace.folder(other).rename(workspace.folder(thing))
    with pytest.raises(BadInputError, match=f"holds the artefact {other.key}, which does not belong to this experiment"):
        workspace.manifest(thing)


def test_what_another_stage_needs_is_asked_for_by_its_command(tmp_path: Path) -> None:
    with pytest.raises(MissingArtefactError, match="does not exist yet; make it with: dasae extract demo"):
        Workspace(tmp_path).require(artefact(), "dasae extract demo")


def test_a_child_is_out_of_date_once_its_parent_was_made_again(tmp_path: Path) -> None:
    workspace, parent, child = Workspace(tmp_path), artefact("parent"), artefact("child", of="parent")
    publish(workspace, parent)
    publish(workspace, child, parents=(parent,))
    assert workspace.manifest(child) is not None
    (workspace.folder(parent) / MANIFEST).unlink()
    assert workspace.manifest(child) is None
    publish(workspace, parent)
    assert workspace.manifest(child) is None


def test_a_parent_that_is_made_again_while_its_child_is_made_leaves_the_child_out_of_date(tmp_path: Path) -> None:
    workspace, parent, child = Workspace(tmp_path), artefact("parent"), artefact("child", of="parent")
    before = workspace.fingerprints([parent])
    assert before == {parent.path: ""}
    publish(workspace, parent)
    with workspace.lock(child):
        workspace.publish(child, parents=before, facts={})
    assert workspace.manifest(child) is None


def test_what_others_fill_is_not_discarded(tmp_path: Path) -> None:
    workspace, thing = Workspace(tmp_path), artefact()
    publish(workspace, thing)
    with workspace.claim(thing, "3") as mine:
        assert mine
        with pytest.raises(PipelineError, match="is being filled by another process: stop that one"):
            workspace.discard(thing)
    assert workspace.manifest(thing)
    workspace.discard(thing)
    assert workspace.manifest(thing) is None


@given(st.text(max_size=200))
def test_no_label_leaves_the_workspace(label: str) -> None:
    workspace, thing = Workspace("ws"), artefact(label)
    folder = workspace.folder(thing)
    assert folder.parent == Path("ws/saes")
    assert folder.resolve().parent == Path("ws/saes").resolve()
    assert len(folder.name) <= 120


def test_a_file_is_no_workspace(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInputError, match="is not a folder"):
        Workspace(tmp_path / "file")


def _append(root: Path, mark: str) -> None:
    with Workspace(root).lock(artefact()) as folder:
        log = folder / "log"
        for _ in range(50):
            log.write_text((log.read_text() if log.exists() else "") + mark)


def test_a_lock_keeps_processes_apart(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_append, args=(tmp_path, mark)) for mark in "ab"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    log = (Workspace(tmp_path).folder(artefact()) / "log").read_text()
    assert log in ("a" * 50 + "b" * 50, "b" * 50 + "a" * 50)


def test_a_discarded_artefact_is_gone_and_can_be_made_again(tmp_path: Path) -> None:
    workspace, thing, other = Workspace(tmp_path / "ws"), artefact(), artefact("other")
    publish(workspace, thing)
    publish(workspace, other)
    (workspace.folder(thing) / "checkpoint").mkdir()
    (workspace.folder(thing) / "checkpoint" / "step").write_bytes(b"1")
    workspace.discard(thing)
    workspace.discard(artefact("never made"))
    assert workspace.manifest(thing) is None
    assert not workspace.folder(thing).exists()
    assert workspace.manifest(other) is not None
    publish(workspace, thing)
    assert workspace.manifest(thing) is not None


def test_an_edited_fact_is_told_and_manifests_without_a_seal_stay_valid(tmp_path: Path) -> None:
    workspace, thing = Workspace(tmp_path), artefact()
    publish(workspace, thing)
    path = workspace.folder(thing) / MANIFEST
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"facts": {"n": 6}}))
    with pytest.raises(CorruptArtefactError, match=r"manifest\.json was changed after it was written; delete"):
        workspace.manifest(thing)
    del record["seal"]
    path.write_text(json.dumps(record))
    assert workspace.manifest(thing)


@pytest.mark.parametrize("content", [b"\xff", b"[" * 100_000, b"{}", b"", b"null"])
def test_a_manifest_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes) -> None:
    workspace, thing = Workspace(tmp_path), artefact()
    publish(workspace, thing)
    (workspace.folder(thing) / MANIFEST).write_bytes(content)
    with pytest.raises(CorruptArtefactError, match=r"^\S+ cannot be read; delete \S+ and run the same command again$"):
        workspace.manifest(thing)


def test_temporary_files_are_never_published_and_those_of_the_dead_are_removed(tmp_path: Path) -> None:
    workspace, thing = Workspace(tmp_path), artefact()
    with workspace.lock(thing) as folder:
        (folder / "data.bin").write_bytes(b"12345")
        (folder / ".manifest.json.0123.partial").write_bytes(b"{")
        assert list(workspace.publish(thing).files) == ["data.bin"]
    assert sorted(path.name for path in folder.iterdir()) == ["data.bin", MANIFEST]
    assert workspace.manifest(thing)


def test_a_file_that_is_gone_is_not_published(tmp_path: Path) -> None:
    workspace, thing = Workspace(tmp_path), artefact()
    with workspace.lock(thing) as folder:
        (folder / "data.bin").write_bytes(b"12345")
        with pytest.raises(StorageError, match=r"other\.bin was removed before it was published; run the same command"):
            workspace.publish(thing, files=["data.bin", "other.bin"])
    assert workspace.manifest(thing) is None


def test_nothing_is_discarded_or_locked_through_a_link_out_of_the_workspace(tmp_path: Path) -> None:
    workspace, other, thing = Workspace(tmp_path / "ws"), Workspace(tmp_path / "other"), artefact()
    publish(other, thing)
    (workspace.local / "saes").mkdir(parents=True)
    workspace.folder(thing).symlink_to(other.folder(thing))
    assert workspace.manifest(thing)
    with pytest.raises(BadInputError, match=r"outside .*ws: it is read, but never written or deleted"):
        workspace.discard(thing)
    with (
        pytest.raises(BadInputError, match=r"outside .*ws: it is read, but never written or deleted"),
        workspace.lock(thing),
    ):
        pass
    assert other.manifest(thing)


def test_discarding_a_store_of_many_parts_needs_few_open_files_and_leaves_no_lock(tmp_path: Path) -> None:
    workspace, thing = Workspace(tmp_path), artefact()
    publish(workspace, thing)
    for part in range(200):
        with workspace.claim(thing, str(part)):
            pass
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        workspace.discard(thing)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert list((tmp_path / ".locks").iterdir()) == []


@pytest.mark.parametrize("place", ["", "  ", "s4://bucket/x", "a\0b"])
def test_what_is_no_workspace_is_refused(place: str) -> None:
    with pytest.raises(BadInputError, match="is neither a folder nor an s3://bucket/prefix"):
        Workspace(place)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Workspace("~/ws").local == tmp_path / "ws"
    with pytest.raises(BadInputError, match="there is no such user"):
        Workspace("~nobody-of-that-name/ws")


def test_what_is_out_of_date_is_not_said_to_be_missing(tmp_path: Path) -> None:
    workspace, parent, child = Workspace(tmp_path), artefact("parent"), artefact("child", of=1)
    publish(workspace, parent)
    publish(workspace, child, (parent,))
    workspace.discard(parent)
    publish(workspace, parent)
    with pytest.raises(MissingArtefactError, match=r"is out of date, .* make it again with: dasae train x"):
        workspace.require(child, "dasae train x")
