"""Several processes that extract one study share the work."""

import multiprocessing
from collections import Counter
from pathlib import Path

from faulty import Extraction, files_of, started


def test_four_processes_share_the_shards(finished: Extraction, tmp_path: Path) -> None:
    extraction = finished.copy(tmp_path / "ws").unfilled()
    made = tmp_path / "made"
    made.mkdir()
    barrier = multiprocessing.get_context("forkserver").Barrier(4)
    processes = [started(extraction, made=made, barrier=barrier) for _ in range(4)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert files_of(extraction.workspace.local) == files_of(finished.workspace.local)
    notes = [path.name.split("-", 1) for path in made.iterdir()]
    shards = Counter(shard for _, shard in notes)
    assert len(shards) == 20
    assert set(shards.values()) == {1}
    assert len({process for process, _ in notes}) > 1
