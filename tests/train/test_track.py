"""What training logs, and the services that show it live: stand-ins for both, and TensorBoard where it is installed."""

import io
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from small_study import Study

from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError
from pipeline.sae.formats import WEIGHTS
from pipeline.study.plan import TRAINING_LOG
from pipeline.study.recipe import Resets, TrainConfig
from pipeline.train import cohort
from pipeline.train.cohort import Member, train_cohort
from pipeline.train.step import Trainer
from pipeline.train.track import Service
from pipeline.train.training import train

STEPS = 120


def recipe(**changes: Any) -> TrainConfig:
    base = {"d_sae": 24, "steps": STEPS, "batch_size": 16, "lr_warmup": 5, "l1_warmup": 5, "learning_rate": 1e-2, "l1": 0.3}
    return TrainConfig.model_validate(base | {"resets": Resets(every=10, first=20)} | changes)


def run() -> list[Member]:
    """Three SAEs of different sparsity; latents of the sparsest die and are reset."""
    members = [Member(trainer=Trainer(config=recipe(l1=l1), d_in=8, seed=0), log=io.StringIO()) for l1 in (0.01, 0.6, 5.0)]
    generator = torch.Generator().manual_seed(0)
    train_cohort(members, iter(torch.randn(STEPS, 16, 8, generator=generator) / 8**0.5), STEPS, "test")
    return members


def records(log: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in log.splitlines()]


def test_resets_are_logged_in_total_and_since_the_last_record() -> None:
    reset = 0
    for member in run():
        log = records(member.log.getvalue())
        assert [record["step"] for record in log] == [50, 100, 120]
        totals = [record["resets"] for record in log]
        assert [record["new_resets"] for record in log] == [totals[0], totals[1] - totals[0], totals[2] - totals[1]]
        assert totals[-1] == member.trainer.resets
        reset += totals[-1]
    assert reset > 0


def test_the_pace_is_the_cohorts_and_all_that_differs_from_run_to_run() -> None:
    paces = []
    for first, second in zip(run(), run(), strict=True):
        one, other = records(first.log.getvalue()), records(second.log.getvalue())
        paces.append([record.pop("tokens_per_second") for record in one])
        assert min(paces[-1]) > 0
        assert all(record.pop("tokens_per_second") > 0 for record in other)
        assert one == other
    assert paces[0] == paces[1] == paces[2]


def test_the_progress_bar_tells_the_median_and_the_worst_fvu(monkeypatch: pytest.MonkeyPatch) -> None:
    remarks: list[str] = []

    @contextmanager
    def watched(*_: object) -> Iterator[Any]:
        yield lambda amount=1, remark="": remarks.append(remark)

    monkeypatch.setattr(cohort, "progress", watched)
    fvu = [member.last["fvu"] for member in run()]
    assert len(set(fvu)) == 3
    assert remarks[-1] == f"FVU {statistics.median(fvu):.3f} median, {max(fvu):.3f} worst"


class FakeRun:
    """What Weights & Biases and TensorBoard have in common here: records come in, and the run is ended."""

    def __init__(self, **options: Any):
        self.options = options
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.ended = False

    def log(self, values: dict[str, float], step: int) -> None:
        self.logged.append((step, values))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        if not self.logged or self.logged[-1][0] != step:
            self.logged.append((step, {}))
        self.logged[-1][1][name] = value

    def close(self) -> None:
        self.ended = True

    def __enter__(self) -> "FakeRun":
        return self

    def __exit__(self, *_: object) -> None:
        self.ended = True


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[FakeRun]:
    """The runs that the stand-ins for both services were given."""
    given: list[FakeRun] = []

    def init(**options: Any) -> FakeRun:
        given.append(FakeRun(**options))
        return given[-1]

    wandb, tensorboard = ModuleType("wandb"), ModuleType("torch.utils.tensorboard")
    wandb.init, wandb.Error = init, type("Error", (Exception,), {})  # pyright: ignore[reportAttributeAccessIssue]
    tensorboard.SummaryWriter = lambda log_dir, **options: init(log_dir=log_dir, **options)  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return given


@pytest.fixture
def untrained(study: Study, tmp_path: Path) -> Study:
    """A copy of the study in which two SAEs are to be trained again."""
    shutil.copytree(study.workspace.root, tmp_path / "workspace")
    own = Study(study.experiment, study.plan, Workspace(tmp_path / "workspace"))
    for sae in study.plan.saes[:2]:
        shutil.rmtree(own.workspace.folder(sae.artefact))
    return own


@pytest.mark.parametrize("service", Service)
def test_a_service_gets_every_record_and_changes_nothing(
    study: Study, untrained: Study, runs: list[FakeRun], service: Service
) -> None:
    saes = study.plan.saes[:2]
    assert train(untrained.plan, untrained.workspace, service).made == list(saes)
    assert len(runs) == 2
    for sae, run in zip(saes, runs, strict=True):
        folder = untrained.workspace.folder(sae.artefact)
        assert (folder / WEIGHTS).read_bytes() == (study.workspace.folder(sae.artefact) / WEIGHTS).read_bytes()
        log = records((folder / TRAINING_LOG).read_text())
        assert run.logged == [(record.pop("step"), record) for record in log]
        assert run.ended
        manifest = untrained.workspace.manifest(sae.artefact)
        assert manifest is not None
        assert set(manifest.files) == {"cfg.json", WEIGHTS, TRAINING_LOG}


def test_runs_are_named_after_their_saes(untrained: Study, runs: list[FakeRun]) -> None:
    baseline, full = untrained.plan.saes[:2]
    root = untrained.workspace.root
    train(untrained.plan, untrained.workspace, Service.wandb)
    assert [run.options["name"] for run in runs] == ["baseline seed 0 layer 2", "full seed 0 layer 2"]
    assert {run.options["group"] for run in runs} == {"small"}
    assert runs[1].options["config"]["recipe"]["contrast"]["coefficient"] == 0.1
    assert runs[1].options["dir"] == str(root)
    runs.clear()
    for sae in (baseline, full):
        shutil.rmtree(untrained.workspace.folder(sae.artefact))
    train(untrained.plan, untrained.workspace, Service.tensorboard)
    folders = [str(root / "tensorboard" / "layer2" / sae.artefact.name) for sae in (baseline, full)]
    assert [run.options["log_dir"] for run in runs] == folders


@pytest.mark.parametrize(("service", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_service_that_is_not_installed_is_an_error_before_anything_is_done(
    untrained: Study, monkeypatch: pytest.MonkeyPatch, service: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(BadInputError, match=f"^--track {service}: {service} is not installed; run: pip install {service}$"):
        train(untrained.plan, untrained.workspace, Service(service))
    assert not untrained.workspace.folder(untrained.plan.saes[0].artefact).exists()


def test_a_service_that_lets_nobody_in_is_one_line(
    untrained: Study, runs: list[FakeRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: object) -> None:
        raise sys.modules["wandb"].Error("No API key configured.\nUse `wandb login`.")

    monkeypatch.setattr("wandb.init", refuse)
    with pytest.raises(BadInputError, match=r"^--track wandb: No API key configured\. Use `wandb login`\.$"):
        train(untrained.plan, untrained.workspace, Service.wandb)
    assert runs == []


def test_nobody_imports_a_service_unasked() -> None:
    check = (
        "import sys, pipeline.cli, pipeline.train.training\n"
        "print(set(sys.modules) & {'wandb', 'tensorboard', 'torch.utils.tensorboard'})"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_tensorboard_itself_reads_what_was_logged(untrained: Study) -> None:
    pytest.importorskip("tensorboard", reason="the package tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # pyright: ignore

    train(untrained.plan, untrained.workspace, Service.tensorboard)
    for sae in untrained.plan.saes[:2]:
        shown = EventAccumulator(str(untrained.workspace.root / "tensorboard" / "layer2" / sae.artefact.name))
        shown.Reload()
        log = records((untrained.workspace.folder(sae.artefact) / TRAINING_LOG).read_text())
        assert set(shown.Tags()["scalars"]) == set(log[0]) - {"step"}
        events = shown.Scalars("fvu")
        assert [event.step for event in events] == [record["step"] for record in log]
        assert [event.value for event in events] == pytest.approx([record["fvu"] for record in log])
