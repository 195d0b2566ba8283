"""Runs the training stage: trains every SAE of the study that is missing, in as few passes over the store as possible."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from pipeline.artefacts.storage import LocalStorage, write_atomically
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError
from pipeline.models.model_section import KnownFeatures
from pipeline.runtime.devices import sae_device
from pipeline.runtime.precision import slower_choice
from pipeline.sae.finished import open_sae
from pipeline.sae.formats import CONFIG, WEIGHTS, read_sae, write_sae
from pipeline.store.batches import rows_in_order, split_shards
from pipeline.store.reader import ActivationStore
from pipeline.store.ring import Maker, Ring
from pipeline.study.cutting import streams
from pipeline.study.origins import bring
from pipeline.study.plan import TRAINING_LOG, Plan
from pipeline.study.planned import PlannedSAE, TrainedSAE
from pipeline.train import checkpoint, cohort_size, matching
from pipeline.train.passes import check_rows, tell_of_no_resets
from pipeline.train.run import InTraining, Job, Runner
from pipeline.train.same_rows import take_over
from pipeline.train.track import Service, connect, not_tracked

SECONDS_BETWEEN_CHECKPOINTS = 180.0
SECONDS_BETWEEN_COPIES = 600.0
"""The same where checkpoints are copied to an object store: an SAE's are gigabytes."""


@dataclass(kw_only=True)
class Trained:
    """The outcome of one run of the stage."""

    made: list[PlannedSAE] = field(default_factory=list[PlannedSAE])
    failed: dict[str, str] = field(default_factory=dict[str, str])
    """Each SAE that could not be made, and why. It has no artefact."""


def groups(plan: Plan, workspace: Workspace) -> list[list[TrainedSAE]]:
    """The missing SAEs, in groups that can share one stream of batches; those that are matched to others come last."""
    return streams(sae for sae in plan.to_train if workspace.manifest(sae.artefact) is None)


def cohorts(plan: Plan, workspace: Workspace) -> list[list[TrainedSAE]]:
    """Those groups, in parts that fit together into the memory of the device of this process."""
    fitting = cohort_size.cohort_size(plan.experiment)
    return [group[start : start + fitting] for group in groups(plan, workspace) for start in range(0, len(group), fitting)]


def train(
    plan: Plan,
    workspace: Workspace,
    track: Service | None = None,
    *,
    row_maker: Callable[[Plan, Workspace], Maker] | None = None,
    save_every: float | None = None,
) -> Trained:
    """Train what is missing, from the last checkpoint if there is one; `track` shows the logs live.

    SAEs that others trained are brought into the workspace first. `row_maker` is called if the store is that of a stream: it
    opens what makes the rows that the store does not keep.

    Raises MissingArtefactError when the store was not extracted, BadInputError when it is too small to train on or when the
    service `track` cannot be used, InterruptedRunError after SIGTERM or Ctrl-C, with everything saved, and any error of the
    machine with all saved that can be. The same call then goes on.
    """
    tracker = connect(track, plan.experiment, workspace) if track else not_tracked
    brought = bring(plan.from_outside, plan.experiment, workspace)
    result = Trained(made=brought.made, failed=brought.failed)
    if missing := cohorts(plan, workspace):
        workspace.require(plan.store, f"dasae extract {plan.experiment.argument}")
        store = ActivationStore(workspace.storage(plan.store))
        check_rows(store, plan.experiment)
        ring = _ring(plan, workspace, store, row_maker)
        missing = _without_known(missing, plan, workspace, store, result)
        if save_every is None:
            save_every = SECONDS_BETWEEN_COPIES if workspace.remote else SECONDS_BETWEEN_CHECKPOINTS
        device = sae_device(plan.experiment.run.device)
        recipe, d_in = plan.experiment.train, plan.experiment.model.d_in
        if slower := slower_choice(recipe.precision, recipe.batch_size, d_in, recipe.d_sae, device):
            print(slower, file=sys.stderr)
        tell_of_no_resets({sae.arm: sae.recipe for cohort in missing for sae in cohort})
        runner = Runner(
            store=store,
            tracker=tracker,
            save_every=save_every,
            keep=lambda sae: workspace.keep(sae.artefact),
            device=device,
            ring=ring,
        )
        stage = _Stage(plan, workspace, runner, result)
        for cohort in missing:
            stage.make(cohort)
    sweep(plan, workspace)
    return result


def _ring(
    plan: Plan, workspace: Workspace, store: ActivationStore, row_maker: Callable[[Plan, Workspace], Maker] | None
) -> Ring | None:
    """What makes the rows of a stream; None for a store that keeps all."""
    if store.layout.kept is None:
        return None
    if row_maker is None:
        raise BadInputError(f"{store.storage} keeps only a part of its rows: give train() a row_maker for the others")
    return Ring(artefact=plan.store, workspace=workspace, store=store, make=row_maker(plan, workspace))


def _without_known(
    missing: list[list[TrainedSAE]], plan: Plan, workspace: Workspace, store: ActivationStore, result: Trained
) -> list[list[TrainedSAE]]:
    """The cohorts without the SAEs that were trained on the same rows before, which are published."""
    known = list(take_over([sae for cohort in missing for sae in cohort], plan.store, store, workspace))
    for sae in known:
        print(f"{sae}: taken over from a store with other layers and the same rows", file=sys.stderr)
    result.made += known
    # What makes the rows of a stream takes memory, too.
    return cohorts(plan, workspace) if known or store.layout.kept is not None else missing


def sweep(plan: Plan, workspace: Workspace) -> None:
    """Remove what a run that was killed after publishing left beside its SAEs: checkpoints, tries, temporary files."""
    for sae in plan.to_train:
        folder = workspace.folder(sae.artefact)
        there = ((folder / checkpoint.FOLDER).exists(), (folder / matching.TRIES).exists(), *folder.rglob(".*.partial"))
        if folder.is_symlink() or not any(there) or workspace.manifest(sae.artefact) is None:
            continue
        with workspace.lock(sae.artefact):
            if workspace.manifest(sae.artefact):  # otherwise another process is making it again
                checkpoint.remove(folder)
                shutil.rmtree(checkpoint.own(folder / matching.TRIES), ignore_errors=True)
                LocalStorage(folder).sweep()


@dataclass
class _Stage:
    """Trains and publishes SAEs, and records the outcome of each."""

    plan: Plan
    workspace: Workspace
    runner: Runner
    result: Trained

    def make(self, cohort: list[TrainedSAE]) -> None:
        """Train the SAEs of a cohort that no other process has made meanwhile."""
        with ExitStack() as stack:
            # Locks are taken in one order, so that two processes cannot wait for each other.
            for sae in sorted(cohort, key=lambda sae: sae.artefact.name):
                checkpoint.own(self.workspace.folder(sae.artefact))
                LocalStorage(stack.enter_context(self.workspace.lock(sae.artefact))).sweep()
            cohort = [sae for sae in cohort if self.workspace.manifest(sae.artefact) is None]
            for sae in cohort:
                self.workspace.restore(sae.artefact)
            self.match([sae for sae in cohort if sae.matched_to])
            self.train([sae for sae in cohort if not sae.matched_to])

    def train(self, saes: list[TrainedSAE]) -> None:
        """Train SAEs whose recipe is complete."""
        jobs = [Job(sae=sae, recipe=sae.recipe, folder=self.workspace.folder(sae.artefact)) for sae in saes]
        for members in self.runner.run(jobs):
            self._record(members)
            del members  # or they would be in memory while the next cohort is made

    def _record(self, members: list[InTraining]) -> None:
        for member in members:
            if member.stopped is None:
                self._publish_trained(member)
            else:
                self.result.failed[str(member.job.sae)] = member.stopped

    def match(self, saes: list[TrainedSAE]) -> None:
        """Train SAEs of one layer, searching the sparsity weight of each."""
        searches = [search for sae in saes if (search := self._search(sae))]
        if searches:
            matching.search(searches, self.runner, partial(self._heldout, searches[0].sae))
        for search in searches:
            if search.closest.l0 is None:
                self.result.failed[str(search.sae)] = f"with l1 {search.closest.l1:.3g}: {search.closest.stopped}"
                shutil.rmtree(search.folder)
            else:
                self._publish_matched(search)

    def _search(self, sae: TrainedSAE) -> matching.Search | None:
        """The search for an SAE's sparsity weight, new or resumed. None without a target L0, with the reason in `failed`."""
        target_sae = sae.matched_to
        assert target_sae is not None
        if self.workspace.manifest(target_sae.artefact) is None:
            self.result.failed[str(sae)] = f"it is matched to {target_sae}, which is not trained"
            return None
        parents = self.workspace.fingerprints([target_sae.artefact])
        matched = open_sae(target_sae.artefact, self.workspace).to(self.runner.device)
        (target,) = matching.heldout_l0([matched], self._heldout(sae))
        if not target:
            self.result.failed[str(sae)] = f"no latent of {target_sae}, to which it is matched, fires: lower its l1"
            return None
        folder = self.workspace.folder(sae.artefact) / matching.TRIES
        return matching.Search(sae=sae, folder=folder, target=target, parents=parents)

    def _heldout(self, sae: TrainedSAE) -> Iterator[torch.Tensor]:
        _, heldout = split_shards(self.runner.store, sae.recipe.heldout_shards, sae.recipe.heldout_within)
        return rows_in_order(self.runner.store, sae.layer, heldout)

    def _publish_trained(self, member: InTraining) -> None:
        sae, folder = member.job.sae, member.job.folder
        write_sae(member.trainer.finished(self.runner.scale(sae)), folder, self._metadata(sae))
        facts = self._facts(sae, member.trainer.resets, member.seconds)
        self.workspace.publish(sae.artefact, files=[CONFIG, WEIGHTS, TRAINING_LOG], facts=facts)
        # Only now: a run that is killed before it publishes resumes from the checkpoint.
        checkpoint.remove(folder)
        self.result.made.append(sae)

    def _publish_matched(self, search: matching.Search) -> None:
        sae, folder = search.sae, self.workspace.folder(search.sae.artefact)
        search.check_kept()
        log = (search.kept / TRAINING_LOG).read_bytes()
        # Without this, a stale artefact would look damaged while its files are replaced.
        self.workspace.reopen(sae.artefact)
        write_sae(read_sae(search.kept), folder, self._metadata(sae) | {"matching": search.facts})
        write_atomically(folder / TRAINING_LOG, log)
        write_atomically(folder / matching.RECORD, json.dumps(search.outcome, indent=1).encode())
        seconds = sum(tried.seconds for tried in search.tries)
        self.workspace.publish(
            sae.artefact,
            files=[CONFIG, WEIGHTS, TRAINING_LOG, matching.RECORD],
            parents=search.parents,
            facts=self._facts(sae, search.closest.resets, seconds) | {"matching": search.facts},
        )
        shutil.rmtree(search.folder)
        self.result.made.append(sae)
        if not search.found:
            reached = f"L0 {search.closest.l0:.4g} after {len(search.tries)} tries, wanted {search.target:.4g}"
            print(f"not matched within {matching.TOLERANCE:.0%}: {sae}: {reached}", file=sys.stderr)

    def _metadata(self, sae: TrainedSAE) -> dict[str, Any]:
        experiment = self.plan.experiment
        hook = {
            "hook_name": f"blocks.{sae.layer}.hook_resid_post",
            "hook_layer": sae.layer,
            "context_size": experiment.store.context,
            "prepend_bos": True,
        }
        return {
            "model_name": experiment.model.name,
            **({} if isinstance(experiment.model, KnownFeatures) else hook),
            "arm": sae.arm,
            "seed": sae.seed,
        }

    def _facts(self, sae: TrainedSAE, resets: int, seconds: float) -> dict[str, Any]:
        return {
            "steps": sae.recipe.steps,
            "tokens": sae.recipe.steps * sae.recipe.batch_size,
            "resets": resets,
            "seconds": round(seconds, 1),
            "device": str(self.runner.device),
        }
