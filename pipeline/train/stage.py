"""The training stage: every SAE of the study that does not exist yet, in as few passes over the store as possible."""

import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pipeline.experiment import Experiment
from pipeline.plan import TRAINING_LOG, Plan, PlannedSAE
from pipeline.sources import SyntheticModel
from pipeline.store.batches import shuffled_batches, split_shards
from pipeline.store.reader import ActivationStore
from pipeline.train.cohort import Member, train_cohort
from pipeline.train.step import Trainer
from pipeline.train.track import Service, Tracker, connect
from pipeline.workspace import Workspace


@dataclass(kw_only=True)
class Trained:
    """What a run of the stage did."""

    made: list[PlannedSAE] = field(default_factory=list)
    diverged: dict[str, int] = field(default_factory=dict)
    """SAE to the step at which its loss was no longer finite. It has no artefact."""


def cohorts(plan: Plan, workspace: Workspace) -> list[list[PlannedSAE]]:
    """The SAEs still to be trained, in groups that can share one stream of batches."""
    groups: dict[tuple[object, ...], list[PlannedSAE]] = defaultdict(list)
    for sae in plan.saes:
        if workspace.manifest(sae.artefact) is None:
            recipe = sae.recipe
            stream = (recipe.batch_size, recipe.steps, recipe.data_seed, recipe.heldout_shards, recipe.buffer_chunks)
            groups[(sae.layer, *stream)].append(sae)
    return list(groups.values())


def train(plan: Plan, workspace: Workspace, track: Service | None = None) -> Trained:
    """Train what is missing, and show it while it goes on in the service `track`.

    Raises MissingArtefactError when the store was not extracted, BadInputError when it is too small to train on or when the
    service cannot be used.
    """
    tracker = connect(track, plan.experiment, workspace) if track else lambda _: nullcontext()
    missing = cohorts(plan, workspace)
    result = Trained()
    if missing:
        workspace.require(plan.store, f"dasae extract {plan.experiment.argument}")
        store = ActivationStore(workspace.storage(plan.store))
        for cohort in missing:
            train_one(cohort, store, plan.experiment, workspace, result, tracker)
    return result


def train_one(
    cohort: list[PlannedSAE],
    store: ActivationStore,
    experiment: Experiment,
    workspace: Workspace,
    result: Trained,
    tracker: Callable[[PlannedSAE], AbstractContextManager[Tracker | None]],
) -> None:
    """Train one cohort and publish its SAEs; adds what happened to `result`."""
    with ExitStack() as stack:
        # Always in the same order, so that two processes cannot each hold what the other waits for.
        ordered = sorted(cohort, key=lambda sae: sae.artefact.name)
        folders = {sae.artefact.name: stack.enter_context(workspace.lock(sae.artefact)) for sae in ordered}
        cohort = [sae for sae in cohort if workspace.manifest(sae.artefact) is None]
        if not cohort:
            return
        layer, recipe = cohort[0].layer, cohort[0].recipe
        training, _ = split_shards(store, recipe.heldout_shards)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        members = [
            Member(
                trainer=Trainer(config=sae.recipe, d_in=store.layout.d_in, seed=sae.seed, device=device),
                tracker=stack.enter_context(tracker(sae)),
                log=stack.enter_context(
                    (folders[sae.artefact.name] / TRAINING_LOG).open("w", encoding="utf-8", buffering=1)
                ),
            )
            for sae in cohort
        ]
        batches = shuffled_batches(
            store,
            layer,
            training,
            batch_size=recipe.batch_size,
            buffer_chunks=recipe.buffer_chunks,
            seed=recipe.data_seed,
        )
        started = time.monotonic()
        train_cohort(members, batches, recipe.steps, f"train {len(cohort)} SAEs, layer {layer}")
        seconds = time.monotonic() - started
        for sae, member in zip(cohort, members, strict=True):
            if member.diverged_at is not None:
                result.diverged[str(sae)] = member.diverged_at
                continue
            _publish(
                sae, member, folders[sae.artefact.name], experiment, store.scale(layer), seconds / len(cohort), workspace
            )
            result.made.append(sae)


def _publish(
    sae: PlannedSAE,
    member: Member,
    folder: Path,
    experiment: Experiment,
    scale: float,
    seconds: float,
    workspace: Workspace,
) -> None:
    hook = {
        "hook_name": f"blocks.{sae.layer}.hook_resid_post",
        "hook_layer": sae.layer,
        "context_size": experiment.store.context,
        "prepend_bos": True,
    }
    metadata = {
        "model_name": experiment.model.name,
        **({} if isinstance(experiment.model, SyntheticModel) else hook),
        "arm": sae.arm,
        "seed": sae.seed,
    }
    member.trainer.finished(scale).save(folder, metadata)
    trainer = member.trainer
    workspace.publish(
        sae.artefact,
        facts={
            "steps": trainer.done,
            "tokens": trainer.done * sae.recipe.batch_size,
            "resets": trainer.resets,
            "seconds": round(seconds, 1),
            "device": str(trainer.device),
        },
    )
