"""Trains a cohort: several SAEs that take every step on the same batch, each exactly as if it were alone.

On a CPU each SAE steps in one thread, and the SAEs share the cores. That is as fast as giving all cores to one SAE after
another, and makes the weights independent of the number of cores.
"""

import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from pipeline.errors import DegenerateSAEError, DivergedSAEError, InterruptedRunError, PipelineError, in_one_line
from pipeline.runtime.interrupt import stop_on_signal
from pipeline.runtime.memory import memory_needed
from pipeline.runtime.precision import tensor_cores
from pipeline.runtime.progress import progress
from pipeline.runtime.threads import one_thread, single_threads
from pipeline.train import on_gpu
from pipeline.train.step import StepMetrics, Trainer
from pipeline.train.track import Tracker

ForEach = Callable[..., list[Any]]
"""Called like `map`, returns a list."""

LOG_EVERY = 50
SAVING_SHARE = 0.02
"""Most of a training's time that its checkpoints take, but for the first: slow ones come less often."""
DEAD_WINDOW = 500
"""Steps without firing after which the log counts a latent as dead, in every arm."""

OWN_FAILURES = (DegenerateSAEError, DivergedSAEError)
"""What an SAE does wrong by itself, and would do again. It stops alone; any other error ends the run of the whole cohort."""


class Lines(Protocol):
    """Where a log goes."""

    def write(self, line: str, /) -> object:
        """Append a line."""


@dataclass(kw_only=True)
class Member:
    """One SAE of a cohort, and where its log goes."""

    trainer: Trainer
    log: Lines
    name: str = ""
    """Names it in messages."""
    tracker: Tracker | None = None
    """Gets what the log gets; None without `--track`."""
    stopped: str | None = None
    """Which failure of its own stopped it before the end; the others go on."""
    error: Exception | None = None
    """What went wrong on the machine in its last step or record, which may be half done. It ends the run."""
    last: dict[str, float] = field(default_factory=dict[str, float])
    """Last record of its log."""

    @property
    def sound(self) -> bool:
        """True if it can go on from here: its last step is whole, and the record of that step is written if one is due."""
        done, steps = self.trainer.done, self.trainer.config.steps
        due = done if done == steps else done - done % LOG_EVERY
        return self.stopped is None and self.error is None and self.last.get("step", 0) == due


def train_cohort(
    members: Sequence[Member],
    batches: Iterator[torch.Tensor],
    steps: int,
    title: str,
    *,
    save: Callable[[Sequence[Member]], None] = lambda _: None,
    save_every: float = math.inf,
) -> None:
    """Train every member up to step `steps`, reading each batch once. Writes a JSON line per member every LOG_EVERY steps.

    All members have taken equally many steps, and `batches` begins with the next. `save` gets the members still in training
    every `save_every` seconds, less often where that takes long, and after SIGTERM or Ctrl-C, which then raises
    InterruptedRunError. An error of the machine is raised after `save` got every member that is sound, one by one;
    OutOfMemoryError when memory has run out.
    """
    try:
        _take_steps(members, batches, steps, title, save=save, save_every=save_every)
    except InterruptedRunError:
        raise
    except Exception:  # whatever it is, it is raised again below, after the work is saved
        for member in members:
            if member.sound:
                with suppress(OSError, PipelineError):  # the disk may be the reason; the error itself says so
                    save([member])
        with memory_needed(f"in step {members[0].trainer.done}"):
            raise


def _take_steps(
    members: Sequence[Member],
    batches: Iterator[torch.Tensor],
    steps: int,
    title: str,
    *,
    save: Callable[[Sequence[Member]], None],
    save_every: float,
) -> None:
    active = list(members)
    done, device = members[0].trainer.done, members[0].trainer.device
    logged, logged_at = done, time.perf_counter()
    saved_at, pause = time.monotonic(), save_every
    with (
        progress(title, steps - done, "steps") as advance,
        stop_on_signal() as stop,
        tensor_cores(device),
        _side_by_side(device) as for_each,
    ):
        for step, x_BD in enumerate(itertools.islice(batches, steps - done), start=done + 1):
            x_BD = x_BD.to(device)
            if device.type == "cuda":
                x_BD, _ = on_gpu.batch(x_BD)
            metrics = for_each(partial(_step, x_BD=x_BD), active)
            remark = ""
            if step % LOG_EVERY == 0 or step == steps:
                now = time.perf_counter()
                pace = (step - logged) * len(x_BD) / (now - logged_at)
                logged, logged_at = step, now
                for_each(partial(_log, x_BD=x_BD, pace=pace), active, metrics)
            for member in active:
                if member.error:
                    raise member.error
            active = [member for member in active if member.stopped is None]
            if not active:
                break
            if logged == step:
                fvu = [member.last["fvu"] for member in active]
                remark = f"FVU {statistics.median(fvu):.3f} median, {max(fvu):.3f} worst"
            if stop.is_set() or time.monotonic() - saved_at >= pause:
                began = time.monotonic()
                save(active)
                saved_at = time.monotonic()
                pause = max(save_every, (saved_at - began) / SAVING_SHARE)
            if stop.is_set():
                raise _interrupted(step)
            advance(1, remark)
        else:
            if (reached := active[0].trainer.done) < steps:  # asked to stop while no batch came
                save(active)
                raise _interrupted(reached)


def _interrupted(step: int) -> InterruptedRunError:
    return InterruptedRunError(f"stopped on request after step {step}; training goes on with the same command")


@contextmanager
def _side_by_side(device: torch.device) -> Generator[ForEach]:
    """Calls a function for each member: on a CPU in one thread per core, on a GPU one by one."""
    if device.type != "cpu":
        yield _one_by_one
        return
    with one_thread(), single_threads() as pool:

        def in_threads(function: Callable[..., Any], *items: Iterable[Any]) -> list[Any]:
            return list(pool.map(function, *items))

        yield in_threads


def _one_by_one(function: Callable[..., Any], *items: Iterable[Any]) -> list[Any]:
    return list(map(function, *items))


@contextmanager
def _contained(member: Member) -> Generator[None]:
    """Keeps what goes wrong with one member, so that the others finish the step they are in."""
    try:
        yield
    except OWN_FAILURES as failure:
        member.stopped = in_one_line(failure)
    except Exception as error:
        member.error = error


def _step(member: Member, x_BD: torch.Tensor) -> StepMetrics | None:
    with _contained(member):
        return member.trainer.step(x_BD)
    return None


def _log(member: Member, measured: StepMetrics | None, x_BD: torch.Tensor, pace: float) -> None:
    """Write a record to the log. `pace`, tokens per second of the cohort, is the only value that differs between runs."""
    if measured is not None:
        with _contained(member):
            _record(member, measured, x_BD, pace)


def _record(member: Member, measured: StepMetrics, x_BD: torch.Tensor, pace: float) -> None:
    trainer = member.trainer
    values = {name: float(value) for name, value in (measured.terms | {"fvu": measured.fvu, "l0": measured.l0}).items()}
    if not all(math.isfinite(value) for value in values.values()):
        raise DivergedSAEError(f"loss not finite at step {trainer.done}, lower train.learning_rate")
    record = {
        "step": trainer.done,
        "tokens": trainer.done * len(x_BD),
        **values,
        **{name: float(value) for name, value in vars(trainer.diagnose(x_BD)).items()},
        "dead_fraction": trainer.dead(DEAD_WINDOW).float().mean().item(),
        "resets": trainer.resets,
        "new_resets": trainer.resets - member.last.get("resets", 0),
        "tokens_per_second": round(pace, 1),
    }
    member.log.write(json.dumps(record) + "\n")
    member.last = record
    if member.tracker:
        try:
            member.tracker.log(trainer.done, {name: value for name, value in record.items() if name != "step"})
        except Exception as error:  # the live view is not part of the artefact
            reason = f"{type(error).__name__}: {in_one_line(error)}"
            print(f"{member.name or 'an SAE'} is no longer shown live: {reason}", file=sys.stderr)
            member.tracker = None
