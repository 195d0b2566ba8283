"""An extraction killed at any moment goes on where it was and ends with the same bytes."""

import random
import signal
import time
from pathlib import Path

import pytest
from faulty import Extraction, files_of, started

from pipeline.artefacts.manifest import MANIFEST
from pipeline.extract.extraction import extract
from pipeline.store.writer import commit_name


def killed_and_resumed(fresh: Extraction, finished: Extraction, moments: int, folder: Path) -> None:
    generator = random.Random(moments)
    expected = files_of(finished.workspace.local)
    whole = len(files_of(finished.store))
    killed = 0
    for number in range(moments):
        extraction = fresh.copy(folder / str(number))
        process = started(extraction)
        # Spread by the number of files over all that an extraction does: reading text, laying out, filling, publishing.
        files = int((number + generator.random()) / moments * whole)
        while process.is_alive() and sum(path.is_file() for path in extraction.store.rglob("*")) < files:
            time.sleep(0.001)
        time.sleep(generator.random() * 0.01)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        resumed = started(extraction)
        resumed.join()
        assert resumed.exitcode == 0
        assert files_of(extraction.workspace.local) == expected
        assert extraction.workspace.manifest(extraction.plan.store)
    assert killed > moments / 2


def test_what_a_killed_writer_left_is_no_shard(finished: Extraction, tmp_path: Path) -> None:
    extraction = finished.copy(tmp_path / "ws")
    (extraction.store / MANIFEST).unlink()
    (extraction.store / commit_name(1)).unlink()
    (extraction.store / "layer_01/c/1/0").write_bytes(b"torn")
    (extraction.store / "layer_02/c/1/0").unlink()
    (extraction.store / "commits/.000001.json.4711.partial").write_bytes(b"{")
    assert extract(extraction.plan, extraction.workspace) == [extraction.plan.store]
    assert files_of(extraction.workspace.local) == files_of(finished.workspace.local)
    assert extract(extraction.plan, extraction.workspace) == []


def test_a_killed_extraction_goes_on(fresh: Extraction, finished: Extraction, tmp_path: Path) -> None:
    killed_and_resumed(fresh, finished, 6, tmp_path)


@pytest.mark.slow
def test_an_extraction_killed_at_twenty_moments(fresh: Extraction, finished: Extraction, tmp_path: Path) -> None:
    killed_and_resumed(fresh, finished, 20, tmp_path)
