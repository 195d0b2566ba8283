"""The method's original command, `python experiment.py --out_dir=run_i`."""

import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from small_results import results_of, row
from small_study import Study

from pipeline.report.collect import collect
from pipeline.report.final_info import final_info
from pipeline.study.arms import ARMS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def command() -> ModuleType:
    """The script, imported as a module."""
    spec = importlib.util.spec_from_file_location("experiment_command", ROOT / "experiment.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_runs_are_the_eleven_of_the_plan(command: ModuleType) -> None:
    assert list(command.RUNS) == [f"run_{number}" for number in range(11)]
    assert command.RUNS["run_0"] == "baseline"
    assert command.RUNS["run_3"] == "no-contrast"
    assert all(ARMS[arm].run == int(run.removeprefix("run_")) for run, arm in command.RUNS.items())


def test_a_finished_arm_is_written_out_and_nothing_is_computed(
    study: Study, command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DASAE_EXPERIMENT", study.experiment.argument)
    monkeypatch.setenv("DASAE_WORKSPACE", str(study.workspace.root))
    before = {path: path.stat().st_mtime_ns for path in Path(study.workspace.root).rglob("manifest.json")}
    assert command.main([f"--out_dir={tmp_path / 'results' / 'run_1'}"]) == 0
    assert {path: path.stat().st_mtime_ns for path in Path(study.workspace.root).rglob("manifest.json")} == before
    info = json.loads((tmp_path / "results" / "run_1" / "final_info.json").read_text())
    full = next(row for row in collect(study.plan, study.workspace).rows if row.arm == "full")
    found = info["small layer 2"]
    assert found["means"]["fvu_mean"] == full.fvu
    assert found["means"]["sparse_probing_5_mean"] == full.at(("sparse_probing", "5"))
    assert found["means"]["bpcr_union_mean"] == full.at(("bpcr", "union"))
    assert found["stderrs"]["fvu_stderr"] is None
    assert found["final_info_dict"]["seed"] == [0]
    assert found["degenerate"] == {}


def test_a_missing_sae_is_trained_for_it(
    study: Study, command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = tmp_path / "workspace"
    shutil.copytree(study.workspace.root, workspace)
    for path in [*workspace.glob("saes/magnitude-*"), *workspace.glob("evaluations/magnitude-*")]:
        shutil.rmtree(path)
    monkeypatch.setenv("DASAE_EXPERIMENT", study.experiment.argument)
    monkeypatch.setenv("DASAE_WORKSPACE", str(workspace))
    assert command.main([f"--out_dir={tmp_path / 'run_2'}"]) == 0
    assert len(list(workspace.glob("saes/magnitude-*/manifest.json"))) == 1
    assert (tmp_path / "run_2" / "final_info.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --out_dir; use: python experiment.py --out_dir=run_3"),
        (["--out_dir=run_11"], "--out_dir run_11: its name must be one of run_0, run_1"),
        (["--out_dir=run_03"], "its name must be one of"),
        (["--out_dir=."], "its name must be one of"),
        (["--out_dir=run_1", "--seeds=1"], "unrecognized arguments: --seeds=1"),
        (["--out_dir=run_3"], "arm 'no-contrast' is not part of the study"),
    ],
)
def test_anything_else_is_one_line_and_exit_code_2(
    command: ModuleType,
    small_toml: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(small_toml.parent)
    monkeypatch.setenv("DASAE_EXPERIMENT", str(small_toml))
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not list(small_toml.parent.rglob("run_*"))


def test_it_has_to_be_run_where_the_experiments_are(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DASAE_EXPERIMENT", raising=False)
    assert command.main(["--out_dir=run_1"]) == 2
    error = capsys.readouterr().err
    assert "no experiment 'demo'" in error
    assert "run from the folder that holds experiments/" in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_script_itself_answers(small_toml: Path) -> None:
    environment = {**os.environ, "DASAE_EXPERIMENT": str(small_toml)}
    done = subprocess.run(
        [sys.executable, ROOT / "experiment.py", "--out_dir=run_99"],
        capture_output=True, text=True, check=False, env=environment, cwd=small_toml.parent,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1


def test_final_info_over_seeds_and_a_degenerate_one() -> None:
    sound = [row("full", seed, 5, fvu=fvu, resets=3) for seed, fvu in ((0, 0.1), (1, 0.4))]
    failed = row("full", 2, 5, resets=3, degenerate="no latent fires")
    results = results_of([*sound, failed], experiment="x")
    found = final_info(results)["x layer 5"]
    assert found["means"]["fvu_mean"] == pytest.approx(0.25)
    assert found["stderrs"]["fvu_stderr"] == pytest.approx(statistics.stdev([0.1, 0.4]) / 2**0.5)
    assert found["final_info_dict"] == {"seed": [0, 1, 2], "fvu": [0.1, 0.4, None], "resets": [3, 3, 3]}
    assert found["degenerate"] == {"2": "no latent fires"}
