"""Training that goes on: SAEs taken from their last checkpoints to their last step, with log and checkpoints in a folder."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.artefacts.storage import write_atomically
from pipeline.runtime.devices import training_device
from pipeline.store.batches import shuffled_batches, split_shards
from pipeline.store.reader import ActivationStore
from pipeline.study.plan import TRAINING_LOG
from pipeline.study.planned import TrainedSAE
from pipeline.study.recipe import TrainConfig
from pipeline.train import checkpoint
from pipeline.train.cohort import Member, train_cohort
from pipeline.train.step import Trainer
from pipeline.train.track import Tracker


@dataclass(frozen=True, kw_only=True)
class Job:
    """An SAE of the study, the recipe to train it by, and the folder of its log and checkpoints."""

    sae: TrainedSAE
    recipe: TrainConfig
    folder: Path


@dataclass(kw_only=True)
class InTraining(Member):
    """A job as a member of its cohort."""

    job: Job
    seconds: float = 0.0
    """Its share of the time spent on its cohort, earlier runs included. Known at the end."""


@dataclass(frozen=True, kw_only=True)
class Runner:
    """Trains cohorts of one store. Whoever calls it holds the locks."""

    store: ActivationStore
    tracker: Callable[[TrainedSAE, int], AbstractContextManager[Tracker | None]]
    save_every: float
    """Seconds between checkpoints."""

    def run(self, jobs: Sequence[Job], title: str = "train") -> Iterator[list[InTraining]]:
        """Take jobs that share their batches to the end; yields those that went on from the same step, finished or stopped.

        Raises InterruptedRunError after SIGTERM, with everything saved.
        """
        for done, indices in checkpoint.resume_points([job.folder for job in jobs]).items():
            run = _Run(self, [jobs[index] for index in indices], done)
            yield run.train(title)


@dataclass
class _Run:
    """A cohort taken from step `done`, from which all of it goes on, to its end."""

    runner: Runner
    jobs: Sequence[Job]
    done: int
    seconds: float = 0.0
    """Spent on this cohort, earlier runs included."""

    def train(self, title: str) -> list[InTraining]:
        store, layer, recipe = self.runner.store, self.jobs[0].sae.layer, self.jobs[0].recipe
        training, _ = split_shards(store, recipe.heldout_shards)
        with ExitStack() as stack:
            members = [self._member(job, stack) for job in self.jobs]
            batches = shuffled_batches(
                store,
                layer,
                training,
                batch_size=recipe.batch_size,
                buffer_chunks=recipe.buffer_chunks,
                seed=recipe.data_seed,
                start=self.done,
            )
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
        trainer = Trainer(config=job.recipe, d_in=d_in, seed=job.sae.seed, device=training_device())
        if self.done:
            state, facts = checkpoint.load(job.folder, self.done)
            trainer.load_state(state)
            self.seconds = facts["seconds"]
        # What was logged after the checkpoint will be logged again.
        path = job.folder / TRAINING_LOG
        records = _records(path, self.done)
        write_atomically(path, "".join(f"{json.dumps(record)}\n" for record in records).encode())
        log = stack.enter_context(path.open("a", encoding="utf-8", buffering=1))
        last = records[-1] if records else {}
        opened = stack.enter_context(self.runner.tracker(job.sae, self.done))
        return InTraining(trainer=trainer, log=log, tracker=opened, last=last, job=job)

    def _save(self, members: Sequence[InTraining]) -> None:
        for member in members:
            os.fsync(member.log.fileno())  # or a power cut could leave a checkpoint whose log ends before it
            checkpoint.save(member.job.folder, member.trainer.state(), member.trainer.done, {"seconds": self.seconds})
        for member in members:
            checkpoint.remove(member.job.folder, but=member.trainer.done)


def _records(log: Path, done: int) -> list[dict[str, Any]]:
    """The records of a log up to a step; a torn last line is none."""
    if not done:
        return []
    lines = log.read_text(encoding="utf-8").splitlines()
    complete = [json.loads(line) for line in lines if line.endswith("}")]
    return [record for record in complete if record["step"] <= done]
