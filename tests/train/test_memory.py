"""Memory that does not hold a cohort: it is halved, whether it runs out in making SAEs or in a step."""

import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from small_study import Study

from pipeline.artefacts.workspace import Workspace
from pipeline.errors import OutOfMemoryError
from pipeline.train import cohort_size
from pipeline.train.run import Runner
from pipeline.train.step import Trainer
from pipeline.train.training import groups, train


def weights(workspace: Workspace) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in workspace.local.glob("saes/*/sae_weights.safetensors")}


@pytest.fixture
def untrained(study: Study, tmp_path: Path) -> Workspace:
    return Workspace(
        shutil.copytree(study.workspace.root, tmp_path / "ws", ignore=shutil.ignore_patterns("saes", "evaluations"))
    )


@pytest.mark.parametrize("where", ["making", "stepping"])
def test_a_cohort_that_does_not_fit_is_halved_until_it_does(
    study: Study, untrained: Workspace, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    alive: list[Any] = []  # references, of which a SAE that is gone leaves an empty one
    make, step = Trainer.__post_init__, Trainer.step

    def together() -> int:
        return sum(one() is not None for one in alive)

    def making(self: Trainer) -> None:
        make(self)
        alive.append(weakref.ref(self))
        if where == "making" and together() == 2:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    def stepping(self: Trainer, x_BD: torch.Tensor) -> Any:
        if where == "stepping" and together() > 1 and self.done == 70:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return step(self, x_BD)

    monkeypatch.setattr(Trainer, "__post_init__", making)
    monkeypatch.setattr(Trainer, "step", stepping)
    trained = train(study.plan, untrained)
    assert (len(trained.made), trained.failed) == (3, {})
    assert weights(untrained) == weights(study.workspace)
    assert "out of memory with 3 SAEs; going on with 1 at a time" in capsys.readouterr().err


def test_one_sae_that_does_not_fit_is_an_error_of_one_line(
    study: Study, untrained: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise MemoryError("no room\nat all")

    monkeypatch.setattr(Trainer, "__post_init__", full)
    with pytest.raises(OutOfMemoryError, match="out of memory for 1 SAEs: no room at all; free some, then run the same"):
        train(study.plan, untrained)


def test_a_piece_is_trained_as_the_memory_of_its_own_device_allows(
    study: Study, untrained: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []
    run = Runner.run
    monkeypatch.setattr(Runner, "run", lambda self, jobs: together.append(len(jobs)) or run(self, jobs))
    experiment = study.plan.experiment
    needed = cohort_size._shared_bytes(experiment) + 2.5 * cohort_size._bytes_each(experiment)  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(cohort_size, "free_memory", lambda _: needed / cohort_size.SHARE)
    assert [len(group) for group in groups(study.plan, untrained)] == [3]  # a flow hands it out whole
    assert len(train(study.plan, untrained).made) == 3
    assert together == [2, 1]
    assert weights(untrained) == weights(study.workspace)
