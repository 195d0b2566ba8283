"""The training stage: every SAE of the study that does not exist yet, in as few passes over the store as possible."""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.experiment import Experiment
from pipeline.plan import TRAINING_LOG, Plan, PlannedSAE
from pipeline.sae import CONFIG, WEIGHTS
from pipeline.sources import SyntheticModel
from pipeline.store.batches import shuffled_batches, split_shards
from pipeline.store.reader import ActivationStore
from pipeline.train import checkpoint, memory
from pipeline.train.cohort import Member, train_cohort
from pipeline.train.memory import best_device
from pipeline.train.step import Trainer
from pipeline.train.track import Service, Tracker, connect
from pipeline.workspace import Workspace, write_atomically

SECONDS_BETWEEN_CHECKPOINTS = 180.0


@dataclass(kw_only=True)
class Trained:
    """What a run of the stage did."""

    made: list[PlannedSAE] = field(default_factory=list)
    diverged: dict[str, int] = field(default_factory=dict)
    """SAE to the step at which its loss was no longer finite. It has no artefact."""


def cohorts(plan: Plan, workspace: Workspace) -> list[list[PlannedSAE]]:
    """The SAEs still to be trained, in groups that can share one stream of batches and fit into memory together."""
    groups: dict[tuple[object, ...], list[PlannedSAE]] = defaultdict(list)
    for sae in plan.saes:
        if workspace.manifest(sae.artefact) is None:
            recipe = sae.recipe
            stream = (recipe.batch_size, recipe.steps, recipe.data_seed, recipe.heldout_shards, recipe.buffer_chunks)
            groups[(sae.layer, *stream)].append(sae)
    fitting = memory.cohort_size(plan.experiment)
    return [group[start : start + fitting] for group in groups.values() for start in range(0, len(group), fitting)]


def train(
    plan: Plan, workspace: Workspace, track: Service | None = None, *, save_every: float = SECONDS_BETWEEN_CHECKPOINTS
) -> Trained:
    """Train what is missing, from the last checkpoint where there is one; show it meanwhile in the service `track`.

    Raises MissingArtefactError when the store was not extracted, BadInputError when it is too small to train on or when the
    service cannot be used, InterruptedRunError after SIGTERM, with everything saved.
    """
    tracker = connect(track, plan.experiment, workspace) if track else lambda *_: nullcontext()
    missing = cohorts(plan, workspace)
    result = Trained()
    if missing:
        workspace.require(plan.store, f"dasae extract {plan.experiment.argument}")
        store = ActivationStore(workspace.storage(plan.store))
        for cohort in missing:
            with ExitStack() as stack:
                # Always in the same order, so that two processes cannot each hold what the other waits for.
                for sae in sorted(cohort, key=lambda sae: sae.artefact.name):
                    stack.enter_context(workspace.lock(sae.artefact))
                cohort = [sae for sae in cohort if workspace.manifest(sae.artefact) is None]
                points = checkpoint.resume_points([workspace.folder(sae.artefact) for sae in cohort])
                for done, indices in points.items():
                    run = _Run(plan.experiment, workspace, store, [cohort[index] for index in indices], done)
                    run.train(tracker, save_every, result)
    return result


@dataclass(kw_only=True)
class _InTraining(Member):
    """An SAE of the study as a member of its cohort."""

    sae: PlannedSAE
    folder: Path


@dataclass
class _Run:
    """A cohort taken from step `done`, from which all of it goes on, to its end. Its locks are held."""

    experiment: Experiment
    workspace: Workspace
    store: ActivationStore
    cohort: list[PlannedSAE]
    done: int
    seconds: float = 0.0
    """Spent on this cohort, earlier runs included."""

    def train(
        self,
        tracker: Callable[[PlannedSAE, int], AbstractContextManager[Tracker | None]],
        save_every: float,
        result: Trained,
    ) -> None:
        """Train and publish; adds what happened to `result`."""
        layer, recipe = self.cohort[0].layer, self.cohort[0].recipe
        training, _ = split_shards(self.store, recipe.heldout_shards)
        with ExitStack() as stack:
            members = [self._member(sae, stack, tracker) for sae in self.cohort]
            batches = shuffled_batches(
                self.store,
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

            title = f"train {len(members)} SAEs, layer {layer}" + (f", from step {self.done}" if self.done else "")
            train_cohort(members, batches, recipe.steps, title, save=save, save_every=save_every)
            self.seconds = time.monotonic() - started
        for member in members:
            if member.diverged_at is not None:
                result.diverged[str(member.sae)] = member.diverged_at
            else:
                self._publish(member)
                result.made.append(member.sae)

    def _member(
        self,
        sae: PlannedSAE,
        stack: ExitStack,
        tracker: Callable[[PlannedSAE, int], AbstractContextManager[Tracker | None]],
    ) -> _InTraining:
        folder = self.workspace.folder(sae.artefact)
        trainer = Trainer(config=sae.recipe, d_in=self.store.layout.d_in, seed=sae.seed, device=best_device())
        if self.done:
            state, facts = checkpoint.load(folder, self.done)
            trainer.load_state(state)
            self.seconds = facts["seconds"]
        # What was logged after the checkpoint will be logged again.
        records = _records(folder / TRAINING_LOG, self.done)
        write_atomically(folder / TRAINING_LOG, "".join(f"{json.dumps(record)}\n" for record in records).encode())
        log = stack.enter_context((folder / TRAINING_LOG).open("a", encoding="utf-8", buffering=1))
        last = records[-1] if records else {}
        opened = stack.enter_context(tracker(sae, self.done))
        return _InTraining(trainer=trainer, log=log, tracker=opened, last=last, sae=sae, folder=folder)

    def _save(self, members: Sequence[_InTraining]) -> None:
        for member in members:
            member.log.flush()
            checkpoint.save(member.folder, member.trainer.state(), member.trainer.done, {"seconds": self.seconds})
        for member in members:
            checkpoint.remove(member.folder, but=member.trainer.done)

    def _publish(self, member: _InTraining) -> None:
        sae, trainer = member.sae, member.trainer
        hook = {
            "hook_name": f"blocks.{sae.layer}.hook_resid_post",
            "hook_layer": sae.layer,
            "context_size": self.experiment.store.context,
            "prepend_bos": True,
        }
        metadata = {
            "model_name": self.experiment.model.name,
            **({} if isinstance(self.experiment.model, SyntheticModel) else hook),
            "arm": sae.arm,
            "seed": sae.seed,
        }
        trainer.finished(self.store.scale(sae.layer)).save(member.folder, metadata)
        self.workspace.publish(
            sae.artefact,
            files=[CONFIG, WEIGHTS, TRAINING_LOG],
            facts={
                "steps": trainer.done,
                "tokens": trainer.done * sae.recipe.batch_size,
                "resets": trainer.resets,
                "seconds": round(self.seconds / len(self.cohort), 1),
                "device": str(trainer.device),
            },
        )
        # Only now: killed in between, the run would have had to begin again.
        checkpoint.remove(member.folder)


def _records(log: Path, done: int) -> list[dict[str, Any]]:
    """The records of a log up to a step; a torn last line is none."""
    if not done:
        return []
    lines = log.read_text(encoding="utf-8").splitlines()
    complete = [json.loads(line) for line in lines if line.endswith("}")]
    return [record for record in complete if record["step"] <= done]
