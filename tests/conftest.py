"""A small study, run once for all tests that read its artefacts, and the settings every test needs."""

import os
import signal

# Before anything imports the libraries that read them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["DO_NOT_TRACK"] = "1"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ.setdefault("MPLBACKEND", "agg")

from pathlib import Path

import hypothesis
import pytest
from small_study import SMALL, Study

from pipeline.artefacts.workspace import Workspace
from pipeline.study.experiment import Experiment
from pipeline.study.plan import make_plan

# A shell starts background jobs with SIGINT ignored, which subprocesses would inherit: no test of Ctrl-C could pass.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine is no failure.
# The same examples in every run: what decides whether a change lands must not draw lots.
hypothesis.settings.register_profile("tests", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("tests")


@pytest.fixture
def small_toml(tmp_path: Path) -> Path:
    """The small study's experiment file, to be changed at will."""
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="session")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The small study, finished. Read only."""
    from pipeline.evaluate.evaluation import evaluate
    from pipeline.extract.extraction import extract
    from pipeline.train.training import train

    folder = tmp_path_factory.mktemp("study")
    (folder / "small.toml").write_text(SMALL)
    experiment = Experiment.load(str(folder / "small.toml"))
    plan, workspace = make_plan(experiment), Workspace(folder / "workspace")
    extract(plan, workspace)
    train(plan, workspace)
    evaluate(plan, workspace)
    return Study(experiment, plan, workspace)
