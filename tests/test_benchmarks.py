"""The benchmarks still run. What they measure is not judged here."""

import subprocess
import sys
from pathlib import Path

import pytest
from small_study import Study

from pipeline.artefacts.workspace import Workspace
from pipeline.extract.extraction import extract
from pipeline.study.experiment import Experiment
from pipeline.study.plan import make_plan
from pipeline.train.training import train

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


@pytest.mark.slow
def test_synth_sae_bench(tmp_path: Path) -> None:
    text = (ROOT / "experiments" / "synth-sae-bench-small.toml").read_text()
    for large, small in (
        ("features = 1_024", "features = 64"),
        ("tokens = 3_014_656", "tokens = 20_000\nshard_rows = 4_096"),
        ("d_sae = 256", "d_sae = 32"),
        ("steps = 2_880", "steps = 12"),
        ("l1_warmup = 960", "l1_warmup = 4"),
        ("prefixes = [16, 32, 64, 128, 256]", "prefixes = [16, 32]"),
        ("seeds = [0, 1, 2]", "seeds = [0, 1]"),
        ('"no-contrast", "full", "bt-plain", "bt-full", "bt-ortsae", "bt-c2r", "bt-matryoshka", "jumprelu"',
         '"no-contrast", "bt-plain"'),
    ):  # fmt: skip
        assert large in text
        text = text.replace(large, small)
    (tmp_path / "small.toml").write_text(text)
    plan, workspace = make_plan(Experiment.load(str(tmp_path / "small.toml"))), Workspace(tmp_path / "workspace")
    extract(plan, workspace)
    train(plan, workspace)
    arguments = [str(tmp_path / "small.toml"), "--workspace", str(workspace.root), "--sparsities", "4"]
    table = run("synth_sae_bench.py", *arguments)
    assert "BatchTopK 4, SAELens, raw rows" in table
