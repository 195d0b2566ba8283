"""A folder as storage: what the system refuses is said, nothing leaves the folder, nothing waits for ever."""

import errno
import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from pipeline.artefacts import local_files
from pipeline.artefacts.local_files import remove_tree, sweep, temporary
from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.storage import LocalStorage, explained, read_many
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError, CorruptArtefactError, PipelineError, StorageError


def failing(number: int) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES, errno.ELOOP])
def test_a_listing_that_fails_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    storage = LocalStorage(tmp_path)
    storage.write("layer/0", b"1")
    scandir = os.scandir

    def broken(path: Any) -> Any:
        return failing(number)() if str(path).endswith("layer") else scandir(path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "scandir", broken)
        with pytest.raises(PipelineError, match=f"{tmp_path} cannot be read: {os.strerror(number)}") as refused:
            storage.sizes()
    assert "\n" not in str(refused.value)
    assert isinstance(refused.value, StorageError) == (number in (errno.EIO, errno.ESTALE))
    for owner, name, ask in (
        (Path, "stat", lambda: storage.size("layer/0")),
        (os, "open", lambda: storage.read("layer/0")),
        (os, "open", lambda: storage.write("layer/0", b"2")),
        (Path, "unlink", lambda: storage.delete("layer/0")),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(owner, name, failing(number))
            with pytest.raises(PipelineError, match=f"layer/0 cannot be .*: {os.strerror(number)}"):
                ask()
    assert storage.sizes() == {"layer/0": 1}


def test_absent_is_what_is_not_there(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "none")
    assert storage.sizes() == {}
    assert storage.size("x") is None
    storage.delete("x")
    storage.write("file", b"1")
    assert storage.size("file/x") is None
    storage.delete("file/x")
    for name in ("x", "file/x"):
        with pytest.raises(FileNotFoundError):
            storage.read(name)


def test_one_line_for_every_way_the_system_says_no(tmp_path: Path) -> None:
    full = "Error while serializing: I/O error: No space left on device (os error 28)"
    for error, said in (
        (OSError(errno.ENOSPC, "x"), "No space left on device"),
        (SafetensorError(full), "No space left on device"),
        (MemoryError(), "Cannot allocate memory"),
    ):
        with (
            pytest.raises(StorageError, match=f"x cannot be deleted: {said}; solve that"),
            explained(tmp_path / "x", "deleted"),
        ):
            raise error
    with pytest.raises(SafetensorError), explained(tmp_path):
        raise SafetensorError("Error while deserializing header")
    with pytest.raises(CorruptArtefactError, match=r"^own$"), explained(tmp_path):
        raise CorruptArtefactError("own")


def test_files_may_vanish_while_they_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    for name in ("a", "b/c", "d"):
        storage.write(name, b"1")
    scandir = os.scandir

    def late(path: Any) -> Any:
        entries = list(scandir(path))
        if Path(path) == tmp_path:
            (tmp_path / "a").unlink()
            (tmp_path / "b" / "c").unlink()
            (tmp_path / "b").rmdir()
        return entries

    monkeypatch.setattr(os, "scandir", late)
    assert storage.sizes() == {"d": 1}


def test_a_sweep_takes_what_dead_writers_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    dead = tmp_path / "a" / ".x.0123.partial"
    dead.parent.mkdir()
    dead.write_bytes(b"half")
    with temporary(tmp_path / "a" / "y", b"whole") as live:
        assert storage.sizes() == {}
        assert sweep(tmp_path) == [dead]
        assert live.read_bytes() == b"whole"
        assert sweep(tmp_path) == []
        monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
        assert sweep(tmp_path) == []
    assert not list((tmp_path / "a").iterdir())
    assert sweep(tmp_path / "none") == []


def test_what_is_no_file_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as plug:
        monkeypatch.chdir(tmp_path)
        plug.bind("plug")
    for name in ("pipe", "device", "plug"):
        with pytest.raises(CorruptArtefactError, match=f"{name} is not a regular file"):
            storage.read(name)
    (tmp_path / "huge").touch()
    os.truncate(tmp_path / "huge", 10**13)
    for ask in (lambda: read_many(storage, ["huge"]), lambda: storage.read("huge", 10)):
        with pytest.raises(CorruptArtefactError, match=r"huge has 10000000000000 bytes, more than"):
            ask()


def test_nothing_is_written_or_deleted_through_a_link_that_leaves(tmp_path: Path) -> None:
    outside, root = tmp_path / "outside", tmp_path / "ws"
    (outside / "sub").mkdir(parents=True)
    (outside / "x").write_bytes(b"precious")
    (outside / "sub" / "y").write_bytes(b"precious")
    (root / "saes").mkdir(parents=True)
    (root / "saes" / "inside").mkdir()
    (root / "saes" / "inner").symlink_to("inside")
    workspace, artefact = Workspace(root), Artefact(kind="saes", label="thing", inputs={})
    workspace.folder(artefact).symlink_to(outside)
    storage = workspace.storage(artefact)
    assert storage.read("x") == b"precious"
    assert storage.sizes() == {"x": 8, "sub/y": 8}
    assert f"{artefact.name}/sub/y" in workspace.place("saes").sizes()
    for change in (
        lambda: storage.write("x", b""),
        lambda: storage.create("z", b""),
        lambda: storage.delete("x"),
        lambda: storage.delete("sub/y"),
        storage.sweep,
        lambda: remove_tree(workspace.folder(artefact), root),
    ):
        with pytest.raises(BadInputError, match=r"reached through a link to .*outside.*, outside"):
            change()
    workspace.place("saes/inner").write("x", b"1")
    (root / "saes" / "link").symlink_to(outside / "x")
    workspace.place("saes").write("link", b"mine")  # replaces the link
    (root / "saes" / "inside" / "out").symlink_to(outside)
    remove_tree(root / "saes" / "inside", root)
    assert {path.name: path.read_bytes() for path in outside.rglob("*") if path.is_file()} == {
        "x": b"precious",
        "y": b"precious",
    }


def test_a_link_to_nothing_or_in_a_circle_is_said(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    (tmp_path / "gone").symlink_to("nowhere")
    for ask in (storage.sizes, lambda: storage.size("gone"), lambda: storage.read("gone"), lambda: storage.read("gone/x")):
        with pytest.raises(BadInputError, match="gone is a link to nowhere, which does not exist"):
            ask()
    storage.delete("gone")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    with pytest.raises(BadInputError, match=r"a/up is a link to .* above it"):
        storage.sizes()


def test_without_hard_links_the_first_writer_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    storage = LocalStorage(tmp_path)
    assert [storage.create("record", content) for content in (b"first", b"second")] == [True, False]
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"record": b"first"}


def test_files_are_as_the_umask_says_and_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = os.umask(0o027)
    try:
        LocalStorage(tmp_path).write("file", b"1")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    steps: list[str] = []
    sync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        steps.append(Path(f"/proc/self/fd/{descriptor}").readlink().name.split(".")[-1])
        sync(descriptor)

    def renamed(path: Path, target: Path) -> Path:
        steps.append("rename")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(local_files.Path, "replace", renamed)
    LocalStorage(tmp_path / "new").write("file", b"1")
    assert steps == [tmp_path.name, "partial", "rename", "new"]
