"""A disk without room: one line, nothing half written, and the same command goes on when there is room."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty import Extraction, files_of, started

from pipeline.store.reader import ActivationStore
from pipeline.store.writer import commit_name


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 3 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk]
    mounted = subprocess.run(mount, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a file system can be mounted by root only: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_stops_an_extraction_between_two_shards(
    fresh: Extraction, finished: Extraction, small_disk: Path, tmp_path: Path
) -> None:
    extraction, error = fresh.copy(small_disk / "ws"), tmp_path / "error"
    stopped = started(extraction, error=error)
    stopped.join()
    assert stopped.exitcode == 3
    assert "cannot be written: No space left on device; solve that, then run the same command again" in error.read_text()
    assert "\n" not in error.read_text()
    assert not list(small_disk.rglob("*.partial"))
    earlier = ActivationStore(extraction.store, partial=True)
    assert 0 < len(earlier.shards) < earlier.layout.shards
    for shard in earlier.shards:
        earlier.read(1, *earlier.row_range(shard))

    subprocess.run(["mount", "-o", "remount,size=30m", small_disk], check=True)
    resumed = started(extraction)
    resumed.join()
    assert resumed.exitcode == 0
    assert files_of(extraction.workspace.local) == files_of(finished.workspace.local)


def test_a_file_that_may_not_grow_leaves_earlier_shards_as_they_were(finished: Extraction, tmp_path: Path) -> None:
    extraction, error = finished.copy(tmp_path / "ws"), tmp_path / "error"
    (extraction.store / "manifest.json").unlink()
    for shard in (3, 7):
        (extraction.store / commit_name(shard)).unlink()
    intact = files_of(extraction.store)
    stopped = started(extraction, largest_file=20_000, error=error)
    stopped.join()
    assert stopped.exitcode == 3
    assert "layer_01/c/3/0 cannot be written: File too large" in error.read_text()
    assert files_of(extraction.store) == intact

    resumed = started(extraction)
    resumed.join()
    assert resumed.exitcode == 0
    assert files_of(extraction.workspace.local) == files_of(finished.workspace.local)
