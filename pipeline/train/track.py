"""Shows training logs live in TensorBoard or Weights & Biases. What they get is a copy; no artefact contains it.

Neither library is imported unless `--track` names it.
"""

import importlib
import os
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.errors import BadInputError, in_one_line

if TYPE_CHECKING:  # the command line imports this module for the names of the services, and must start fast
    from pipeline.artefacts.workspace import Workspace
    from pipeline.study.experiment import Experiment
    from pipeline.study.planned import TrainedSAE

PROJECT = "direction-aware-sae"
"""Project of the runs in Weights & Biases, unless WANDB_PROJECT names another."""


class Service(StrEnum):
    """Services that show a training run live."""

    tensorboard = "tensorboard"
    wandb = "wandb"


class Tracker(Protocol):
    """Receives the log of one SAE."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the values measured at `step`."""
        ...


def connect(
    service: Service, experiment: "Experiment", workspace: "Workspace"
) -> Callable[["TrainedSAE", int], AbstractContextManager[Tracker]]:
    """Returns a function that opens an SAE's tracker, given the step it resumes from. Trackers write below the workspace.

    Raises BadInputError when the service's library is not installed. Opening raises it when Weights & Biases refuses.
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


def not_tracked(_sae: "TrainedSAE", _done: int) -> AbstractContextManager[None]:
    """Opens no tracker; takes the place of what `connect` returns when there is no `--track`."""
    return nullcontext()


class _TensorBoard:
    def __init__(self, writer: Any):
        self.writer = writer

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)


@contextmanager
def _tensorboard(library: Any, _: "Experiment", workspace: "Workspace", sae: "TrainedSAE", done: int) -> Generator[Tracker]:
    folder = workspace.local / "tensorboard" / f"layer{sae.layer}" / sae.artefact.name
    # purge_step hides the later steps of an interrupted run.
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
) -> Generator[Tracker]:
    identity = {"arm": sae.arm, "seed": sae.seed, "layer": sae.layer, "key": sae.artefact.key, "from_step": done}
    try:
        run = library.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=experiment.name,
            name=str(sae),
            config=identity | {"recipe": sae.recipe.model_dump()},
            dir=str(workspace.local),
            reinit="create_new",  # the SAEs of a cohort are tracked at the same time
        )
    except library.Error as error:
        raise BadInputError(f"--track wandb: {in_one_line(error)}") from None
    with run:
        yield _WandB(run)
