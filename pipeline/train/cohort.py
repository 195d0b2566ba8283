"""A cohort: several SAEs that take every step on the same batch, each exactly as if it were alone.

On a CPU each SAE steps in one thread and the SAEs share the cores. That is as fast as giving all cores to one SAE after the
other, and it makes the weights the same on any number of cores.
"""

import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TextIO

import torch

from pipeline.progress import progress
from pipeline.train.step import StepMetrics, Trainer

LOG_EVERY = 50
DEAD_WINDOW = 500
"""Steps without firing after which the log counts a latent as dead, for every arm alike."""


@dataclass(kw_only=True)
class Member:
    """One SAE of a cohort and where its log goes."""

    trainer: Trainer
    log: TextIO
    diverged_at: int | None = None
    """Step at which its loss was no longer finite; it was stopped there, the others went on."""
    last: dict[str, float] = field(default_factory=dict)
    """The last record of its log."""


def train_cohort(members: Sequence[Member], batches: Iterator[torch.Tensor], steps: int, title: str) -> None:
    """Take `steps` steps with every member, each batch read once. Writes a JSON line per member every LOG_EVERY steps."""
    active = list(members)
    device = members[0].trainer.device
    with progress(title, steps, "steps") as advance, _side_by_side(device) as step_all:
        for step, x_BD in enumerate(itertools.islice(batches, steps), start=1):
            metrics = step_all(active, x_BD.to(device))
            remark = ""
            if step % LOG_EVERY == 0 or step == steps:
                for member, measured in zip(active, metrics, strict=True):
                    _log(member, measured, x_BD.to(device))
                active = [member for member in active if member.diverged_at is None]
                if not active:
                    break
                fvu = [member.last["fvu"] for member in active]
                remark = f"FVU {min(fvu):.3f} to {max(fvu):.3f}"
            advance(1, remark)


@contextmanager
def _side_by_side(device: torch.device) -> Iterator[Callable[[Sequence[Member], torch.Tensor], list[StepMetrics]]]:
    """Yields a function that steps all members on one batch."""
    if device.type != "cpu":
        yield lambda members, x_BD: [member.trainer.step(x_BD) for member in members]
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield lambda members, x_BD: list(pool.map(lambda member: member.trainer.step(x_BD), members))
    finally:
        torch.set_num_threads(threads)


def _log(member: Member, measured: StepMetrics, x_BD: torch.Tensor) -> None:
    trainer = member.trainer
    values = {name: float(value) for name, value in vars(measured).items()}
    if not all(math.isfinite(value) for value in values.values()):
        member.diverged_at = trainer.done
        return
    member.last = {
        "step": trainer.done,
        "tokens": trainer.done * len(x_BD),
        **values,
        **{name: float(value) for name, value in vars(trainer.diagnose(x_BD)).items()},
        "dead_fraction": trainer.dead(DEAD_WINDOW).float().mean().item(),
        "resets": trainer.resets,
    }
    member.log.write(json.dumps(member.last) + "\n")
