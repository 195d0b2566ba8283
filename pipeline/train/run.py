"""Trains cohorts from their last checkpoints to their last step, with a log and checkpoints in each SAE's folder."""

import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipeline.errors import OutOfMemoryError
from pipeline.runtime.devices import sae_device
from pipeline.runtime.memory import memory_needed
from pipeline.store.batches import scale_of, shuffled_batches, split_shards
from pipeline.store.reader import ActivationStore
from pipeline.store.ring import Ring
from pipeline.study.plan import TRAINING_LOG
from pipeline.study.planned import TrainedSAE
from pipeline.study.recipe import TrainConfig
from pipeline.train import checkpoint
from pipeline.train.cohort import Member, train_cohort
from pipeline.train.log import Log
from pipeline.train.step import Trainer
from pipeline.train.track import Tracker


@dataclass(frozen=True, kw_only=True)
class Job:
    """One SAE to train: its recipe, and the folder of its log and checkpoints."""

    sae: TrainedSAE
    recipe: TrainConfig
    folder: Path


@dataclass(kw_only=True)
class InTraining(Member):
    """A job that is a member of a cohort."""

    job: Job
    seconds: float = 0.0
    """Its share of the cohort's time, earlier runs included. Set when the cohort ends."""


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Trains cohorts from one store. The caller holds the locks."""

    store: ActivationStore
    tracker: Callable[[TrainedSAE, int], AbstractContextManager[Tracker | None]]
    save_every: float
    """Seconds between checkpoints."""
    keep: Callable[[TrainedSAE], None]
    """Called when an SAE's checkpoint is saved."""
    device: torch.device = field(default_factory=sae_device)
    ring: Ring | None = None
    """Where the shards come from that the store of a stream does not keep."""

    def scale(self, sae: TrainedSAE) -> float:
        """The factor of the batches that an SAE is trained on."""
        training, _ = split_shards(self.store, sae.recipe.heldout_shards, sae.recipe.heldout_within)
        return scale_of(self.store, sae.layer, training, sae.recipe.window_shards)

    def run(self, jobs: Sequence[Job], title: str = "train") -> Iterator[list[InTraining]]:
        """Train jobs that share their batches. Yields the members of each cohort when it ends, finished or stopped.

        Jobs whose checkpoints are of the same step form a cohort. Where memory does not hold it, each half of it is one.
        Raises InterruptedRunError after SIGTERM or Ctrl-C, with everything saved.
        """
        waiting = [list(jobs)] if jobs else []
        while waiting:
            together = waiting.pop(0)
            for done, indices in checkpoint.resume_points([job.folder for job in together]).items():
                cohort = [together[index] for index in indices]
                if members := self._fitting(cohort, done, title):
                    yield members
                    del members  # or they would be in memory while the next cohort is made
                    continue
                gc.collect()  # the error and the SAEs that it stopped refer to each other
                half = len(cohort) // 2
                waiting += [cohort[:half], cohort[half:]]
                print(f"out of memory with {len(cohort)} SAEs; going on with {half} at a time", file=sys.stderr)

    def _fitting(self, cohort: Sequence[Job], done: int, title: str) -> list[InTraining] | None:
        """Train a cohort; None where memory does not hold it. Raises OutOfMemoryError for one SAE alone."""
        try:
            return _Run(self, cohort, done).train(title)
        except OutOfMemoryError:
            if len(cohort) == 1:
                raise
            return None


@dataclass
class _Run:
    """A cohort whose members all resume from step `done`."""

    runner: Runner
    jobs: Sequence[Job]
    done: int
    seconds: float = 0.0
    """Spent on this cohort, earlier runs included."""

    def train(self, title: str) -> list[InTraining]:
        store, layer, recipe = self.runner.store, self.jobs[0].sae.layer, self.jobs[0].recipe
        training, _ = split_shards(store, recipe.heldout_shards, recipe.heldout_within)
        with ExitStack() as stack:
            with memory_needed(f"for {len(self.jobs)} SAEs"):
                members = [self._member(job, stack) for job in self.jobs]
            batches = shuffled_batches(
                store,
                layer,
                training,
                batch_size=recipe.batch_size,
                buffer_chunks=recipe.buffer_chunks,
                seed=recipe.data_seed,
                window_shards=recipe.window_shards,
                start=self.done,
                stop=recipe.steps,
                ring=self.runner.ring,
                device=self.runner.device,
            )
            stack.enter_context(closing(batches))
            started = time.monotonic() - self.seconds

            def save(active: Sequence[Member]) -> None:
                self.seconds = time.monotonic() - started
                self._save([member for member in members if member in active])

            title = f"{title} {len(members)} SAEs, layer {layer}" + (f", from step {self.done}" if self.done else "")
            train_cohort(members, batches, recipe.steps, title, save=save, save_every=self.runner.save_every)
            self.seconds = time.monotonic() - started
        for member in members:
            member.seconds = self.seconds / len(members)
        return members

    def _member(self, job: Job, stack: ExitStack) -> InTraining:
        d_in = self.runner.store.layout.d_in
        trainer = Trainer(config=job.recipe, d_in=d_in, seed=job.sae.seed, device=self.runner.device)
        path = job.folder / TRAINING_LOG
        content = b""
        if self.done:
            state, facts = checkpoint.load(job.folder, self.done)
            trainer.load_state(state)
            self.seconds = facts["seconds"]
            content = path.read_bytes()[: facts["log"]["bytes"]]
        # Later steps are taken again, so their checkpoints and records are dropped. Checkpoints first: without their part of
        # the log they would look damaged.
        checkpoint.remove(job.folder, but=self.done or None)
        log = stack.enter_context(closing(Log(path, content)))
        tracker = stack.enter_context(self.runner.tracker(job.sae, self.done))
        last: dict[str, float] = json.loads(content.splitlines()[-1]) if content else {}
        return InTraining(trainer=trainer, log=log, name=str(job.sae), tracker=tracker, last=last, job=job)

    def _save(self, members: Sequence[InTraining]) -> None:
        for member in members:
            checkpoint.save(member.job.folder, member.trainer.state(), member.trainer.done, {"seconds": self.seconds})
        for member in members:
            checkpoint.remove(member.job.folder, but=member.trainer.done)
            self.runner.keep(member.job.sae)
