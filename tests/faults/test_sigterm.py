"""SIGTERM, as a scheduler sends it before it kills: the shard in hand is committed."""

import subprocess
import sys
import time
from pathlib import Path

from faulty import Extraction, files_of, started

from pipeline.store.reader import ActivationStore

DASAE = [sys.executable, "-c", "from pipeline.cli import main; main()"]


def test_sigterm_stops_after_the_shard_in_hand_and_the_same_command_goes_on(finished: Extraction, tmp_path: Path) -> None:
    extraction = finished.copy(tmp_path / "ws").unfilled()
    command = [*DASAE, "extract", str(extraction.toml), "--workspace", str(extraction.workspace.root)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as running:
        while not list(extraction.store.glob("commits/*.json")):
            assert running.poll() is None
            time.sleep(0.005)
        running.terminate()
        _, said = running.communicate()
    assert running.returncode == 143
    assert said.splitlines()[-1].startswith("error: stopped on request; tiny-gemma2-python goes on with the same command")
    assert "Traceback" not in said
    assert not list(extraction.store.rglob("*.partial"))
    assert 0 < len(ActivationStore(extraction.store, partial=True).shards) < 20
    resumed = started(extraction)
    resumed.join()
    assert resumed.exitcode == 0
    assert files_of(extraction.workspace.local) == files_of(finished.workspace.local)
