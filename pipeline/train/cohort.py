"""A cohort: several SAEs that take every step on the same batch, each exactly as if it were alone."""

import itertools
import json
import math
from collections.abc import Iterator, Sequence
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
    with progress(title, steps, "steps") as advance:
        for step, x_BD in enumerate(itertools.islice(batches, steps), start=1):
            x_BD = x_BD.to(members[0].trainer.device)
            metrics = [member.trainer.step(x_BD) for member in active]
            remark = ""
            if step % LOG_EVERY == 0 or step == steps:
                for member, measured in zip(active, metrics, strict=True):
                    _log(member, measured, len(x_BD))
                active = [member for member in active if member.diverged_at is None]
                if not active:
                    break
                fvu = [member.last["fvu"] for member in active]
                remark = f"FVU {min(fvu):.3f} to {max(fvu):.3f}"
            advance(1, remark)


def _log(member: Member, measured: StepMetrics, rows: int) -> None:
    trainer = member.trainer
    values = {name: float(value) for name, value in vars(measured).items()}
    if not all(math.isfinite(value) for value in values.values()):
        member.diverged_at = trainer.done
        return
    member.last = {
        "step": trainer.done,
        "tokens": trainer.done * rows,
        **values,
        "dead_fraction": trainer.dead(DEAD_WINDOW).float().mean().item(),
        "resets": trainer.resets,
    }
    member.log.write(json.dumps(member.last) + "\n")
