"""Live tracking of training by TensorBoard or Weights & Biases: a copy of the log, no part of any artefact.

Neither library is imported before somebody asks for it.
"""

import importlib
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.errors import BadInputError

if TYPE_CHECKING:  # `pipeline.cli` needs the names of the services, and to be quick
    from pipeline.artefacts.workspace import Workspace
    from pipeline.study.experiment import Experiment
    from pipeline.study.planned import TrainedSAE

PROJECT = "direction-aware-sae"
"""Where Weights & Biases files the runs, unless WANDB_PROJECT names another project."""


class Service(StrEnum):
    """What can show a training run while it goes on."""

    tensorboard = "tensorboard"
    wandb = "wandb"


class Tracker(Protocol):
    """Takes the log of one SAE."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record what was measured at `step`."""
        ...


def connect(
    service: Service, experiment: "Experiment", workspace: "Workspace"
) -> Callable[["TrainedSAE", int], AbstractContextManager[Tracker]]:
    """How to open the tracker of an SAE that goes on from a step. It writes below the workspace.

    Raises BadInputError when the service's library is not installed; opening, when Weights & Biases lets nobody in.
    """
    module, run = {
        Service.tensorboard: ("torch.utils.tensorboard", _tensorboard),
        Service.wandb: ("wandb", _wandb),
    }[service]
    try:
        library = importlib.import_module(module)
    except ImportError:
        raise BadInputError(f"--track {service}: {service} is not installed; run: pip install {service}") from None
    return partial(run, library, experiment, workspace)


class _TensorBoard:
    def __init__(self, writer: Any):
        self.writer = writer

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)


@contextmanager
def _tensorboard(library: Any, _: "Experiment", workspace: "Workspace", sae: "TrainedSAE", done: int) -> Iterator[Tracker]:
    folder = workspace.local / "tensorboard" / f"layer{sae.layer}" / sae.artefact.name
    # What an interrupted run wrote of later steps is no longer shown.
    with closing(library.SummaryWriter(str(folder), purge_step=done and done + 1, flush_secs=10)) as writer:
        yield _TensorBoard(writer)


class _WandB:
    def __init__(self, run: Any):
        self.run = run

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)


@contextmanager
def _wandb(
    library: Any, experiment: "Experiment", workspace: "Workspace", sae: "TrainedSAE", done: int
) -> Iterator[Tracker]:
    identity = {"arm": sae.arm, "seed": sae.seed, "layer": sae.layer, "key": sae.artefact.key, "from_step": done}
    try:
        run = library.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=experiment.name,
            name=str(sae),
            config=identity | {"recipe": sae.recipe.model_dump()},
            dir=str(workspace.local),
            reinit="create_new",  # the SAEs of a cohort are trained, and tracked, at the same time
        )
    except library.Error as error:
        raise BadInputError(f"--track wandb: {' '.join(str(error).split())}") from None
    with run:
        yield _WandB(run)
