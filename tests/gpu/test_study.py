"""A whole study with every tensor on a GPU that is not there: nothing on two devices, and the CPU's results."""

import shutil
from pathlib import Path

import pytest
from gpu_runs import files
from pretend_gpu import PretendedGpu
from small_study import SMALL, Study

from pipeline.artefacts.workspace import Workspace
from pipeline.evaluate import capture
from pipeline.evaluate.evaluation import evaluate
from pipeline.extract.extraction import extract
from pipeline.study.evaluations import EVALUATIONS, Need
from pipeline.study.experiment import Experiment
from pipeline.study.plan import make_plan
from pipeline.train import matching
from pipeline.train.training import train

SYNTHETIC = {Need.truth, Need.saelens}
FEW = (
    SMALL.replace("steps = 150", "steps = 3")
    .replace("steps = 120", "steps = 60")
    .replace("tokens = 20_000", "tokens = 12_288")
    .replace('["python/text-kind", "python/docstring-of"]', '["python/text-kind"]')
    .replace('"baseline", "full", "magnitude"', '"full", "l0-matched"')
)
"""The small study in smaller."""


def test_saes_are_evaluated_there_with_the_numbers_of_the_cpu(
    study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(study.workspace.root, tmp_path / "workspace")
    shutil.rmtree(tmp_path / "workspace/evaluations")
    workspace, arms = Workspace(tmp_path / "workspace"), ["full"]
    with PretendedGpu() as gpu:
        monkeypatch.setenv("DASAE_DEVICE", "cuda")
        evaluate(make_plan(study.experiment, arms=arms), workspace)
        assert gpu.launches > 1000
    expected, there = (files(study, place, arms) for place in (study.workspace, workspace))
    assert expected.keys() == there.keys()
    of_others = [entry for entry in EVALUATIONS.values() if entry.siblings or entry.control]
    there_too = [
        entry for entry in EVALUATIONS.values() if not (entry.asked or entry in of_others or entry.needs & SYNTHETIC)
    ]
    assert len(expected) == len(arms) * len(there_too)
    for name, values in expected.items():
        assert there[name] == pytest.approx(values, rel=1e-4, abs=1e-6), name


def test_a_whole_study_runs_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "few.toml").write_text(FEW)
    plan, workspace = make_plan(Experiment.load(str(tmp_path / "few.toml"))), Workspace(tmp_path / "workspace")
    monkeypatch.setattr(matching, "MOST_TRIES", 2)
    monkeypatch.setattr(capture, "PERMUTATIONS", 3)
    with PretendedGpu() as gpu:
        monkeypatch.setenv("DASAE_DEVICE", "cuda")
        for stage in (extract, train, evaluate):
            gpu.reset()
            stage(plan, workspace)
            assert gpu.launches > 1000, stage
    assert all(workspace.manifest(sae.evaluation) for sae in plan.saes)
