"""The benchmarks still run. What they measure is not judged here."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_study import Study

ROOT = Path(__file__).parents[1]


def run(*arguments: str) -> str:
    script, *rest = arguments
    command = [sys.executable, str(ROOT / "benchmarks" / script), *rest]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_reading_and_codecs(study: Study) -> None:
    assert "zarr-python, blosc + crc32c" in run("reading.py", "--rows", "65536", "--rounds", "1", "--steps", "2")
    codecs = run("codec.py", str(study.workspace.folder(study.plan.store)), "--chunks", "4")
    assert "blosc zstd-1 shuffle, 512 KiB blocks" in codecs


@pytest.mark.slow
def test_a_step() -> None:
    arguments = ["--d-in", "64", "--d-sae", "128", "--batch", "256", "--rounds", "1", "--no-memory"]
    assert "ours, bfloat16" in run("train_step.py", *arguments)
