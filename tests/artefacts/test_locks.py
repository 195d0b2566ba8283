"""Locks between processes: who waits, what is left behind, and what is refused."""

import errno
import os
import threading
from pathlib import Path

import pytest

from pipeline.artefacts.locks import Locks
from pipeline.errors import BadInputError


def names(folder: Path) -> list[str]:
    return [path.name for path in (folder / ".locks").iterdir()]


def test_a_lock_keeps_others_away_and_leaves_no_file(tmp_path: Path) -> None:
    locks = Locks(tmp_path / ".locks", tmp_path)
    with locks.held("a"):
        with locks.attempted("a") as second, locks.attempted("b") as other:
            assert (second, other) == (False, True)
        assert names(tmp_path) == ["a"]
    assert names(tmp_path) == []
    with locks.claimed("a", "1"), locks.claimed("a", "2"), locks.alone("a") as alone:
        assert not alone
    assert names(tmp_path) == []


def test_whoever_waits_for_a_lock_that_was_removed_gets_the_next(tmp_path: Path) -> None:
    locks, inside, most = Locks(tmp_path / ".locks", tmp_path), list[int](), list[int]()

    def work() -> None:
        for _ in range(50):
            with locks.held("a"):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(most), max(most)) == (300, 1)
    assert names(tmp_path) == []


def test_a_lock_truncates_nothing_and_follows_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outside, locks = tmp_path / "outside", Locks(tmp_path / "work" / ".locks", tmp_path / "work")
    outside.write_text("kept")
    locks.folder.mkdir(parents=True)
    (locks.folder / "a").symlink_to(outside)
    with pytest.raises(BadInputError, match="a is a link, and locks are files"), locks.held("a"):
        pass
    assert outside.read_text() == "kept"
    elsewhere = Locks(tmp_path / "linked" / ".locks", tmp_path / "linked")
    (tmp_path / "linked").mkdir()
    elsewhere.folder.symlink_to(tmp_path)
    with pytest.raises(BadInputError, match="outside"), elsewhere.held("a"):
        pass

    def none(_descriptor: int, _operation: int) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.raises(BadInputError, match=r"file system has no locks .* \(Lustre: -o flock\)"), locks.held("b"):
        pass
