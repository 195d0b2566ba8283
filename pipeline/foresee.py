"""The command `dasae plan`."""

from typing import Annotated

import typer
from rich.console import Console

from pipeline.front import plan_of
from pipeline.options import ExperimentArgument

GPUsOption = Annotated[int, typer.Option("--workers", min=1, max=10_000, help="GPUs, each with a worker of its own.")]


def foresee(experiment: ExperimentArgument, workers: GPUsOption = 1) -> None:
    """Predict what a study takes on several GPUs: time, tasks, disk, memory, requests. Nothing is measured or made."""
    from pipeline.study.spread import describe

    table, lines = describe(plan_of(experiment), workers)
    say = Console(markup=False, highlight=False, soft_wrap=True).print
    say(table)
    say("\n".join(lines))
