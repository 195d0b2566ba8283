"""The evaluation stage: what the model itself knows of the probe tasks, once; then every SAE, each by its own artefact."""

import json
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from pipeline.artefacts.storage import write_atomically
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import CorruptArtefactError, DegenerateSAEError, InterruptedRunError, MissingArtefactError
from pipeline.evaluate import loss, probing
from pipeline.evaluate.capture import PAIRS_CURVE, Capture, random_tied
from pipeline.evaluate.examples import Behaviour, Examples
from pipeline.evaluate.interference import Interference, SimilarPairs, same_direction
from pipeline.evaluate.pairs import PairBlock, fire_together, firings, pair_blocks
from pipeline.evaluate.reconstruction import Reconstruction
from pipeline.evaluate.recovery import Recovery
from pipeline.evaluate.tasks import ProbeTasks
from pipeline.models.language import LanguageModel, load_tokenizer
from pipeline.models.model_section import SyntheticModel
from pipeline.models.synthetic import FEATURES, GroundTruth
from pipeline.runtime.interrupt import stop_requested
from pipeline.runtime.progress import Advance, progress
from pipeline.sae.finished import open_sae
from pipeline.sae.formats import CONFIG
from pipeline.sae.sae import SAE
from pipeline.store.batches import rows_in_order, split_shards
from pipeline.store.documents import Documents
from pipeline.store.reader import ActivationStore
from pipeline.study.experiment import Experiment
from pipeline.study.plan import CAPTURE, EXAMPLES, GROUND_TRUTH, INTERFERENCE, LOSS, RECONSTRUCTION, SPARSE_PROBING, Plan
from pipeline.study.planned import PlannedSAE
from pipeline.study.study_model import study_model

LLM_PROBING = "llm_probing.json"
STOPPED = "stopped on request; evaluation goes on with the same command"


@dataclass(kw_only=True)
class Evaluated:
    """What a run of the stage did."""

    made: list[PlannedSAE] = field(default_factory=list)
    degenerate: dict[str, str] = field(default_factory=dict)
    """Every degenerate SAE of the plan, evaluated now or earlier, and why it is."""
    untrained: list[str] = field(default_factory=list)
    """SAEs of the plan that do not exist, so that there was nothing to evaluate."""
    failed: dict[str, str] = field(default_factory=dict)
    """SAE that could not be measured, such as one whose files are damaged, and why."""


def evaluate(plan: Plan, workspace: Workspace) -> Evaluated:
    """Evaluate every trained SAE that was not evaluated yet.

    Raises MissingArtefactError when no SAE of the plan was trained.
    """
    missing = unmeasured(plan, workspace)
    result = Evaluated(untrained=[str(sae) for sae in plan.saes if not _is_there(sae, workspace)])
    for layer in dict.fromkeys(sae.layer for sae in missing):
        chosen = [sae for sae in missing if sae.layer == layer]
        result.failed |= evaluate_layer(plan, layer, chosen, workspace)
        result.made += [sae for sae in chosen if str(sae) not in result.failed]
    for sae in plan.saes:
        manifest = workspace.manifest(sae.evaluation)
        if manifest and manifest.facts["degenerate"]:
            result.degenerate[str(sae)] = manifest.facts["degenerate"]
    return result


def unmeasured(plan: Plan, workspace: Workspace) -> list[PlannedSAE]:
    """The SAEs that are trained and not evaluated. Raises MissingArtefactError when no SAE of the plan was trained."""
    trained = [sae for sae in plan.saes if _is_there(sae, workspace)]
    if not trained:
        raise MissingArtefactError(
            f"no SAE of {plan.experiment.name} is trained yet; run: dasae train {plan.experiment.argument}"
        )
    return [sae for sae in trained if workspace.manifest(sae.evaluation) is None]


def _is_there(sae: PlannedSAE, workspace: Workspace) -> bool:
    """Whether an SAE exists, even damaged: that is then said of it alone, when it is loaded."""
    try:
        return workspace.manifest(sae.artefact) is not None
    except CorruptArtefactError:
        return True


def evaluate_layer(plan: Plan, layer: int, saes: list[PlannedSAE], workspace: Workspace) -> dict[str, str]:
    """Evaluate SAEs of one layer, opening that layer's stores once; returns those that could not be, and why."""
    for artefact in (plan.store, *plan.probes.values()):
        workspace.require(artefact, f"dasae extract {plan.experiment.argument}")
    bench = _Bench(plan, layer, workspace)
    failed: dict[str, str] = {}
    stop = stop_requested()
    with progress(f"evaluate layer {layer}", len(saes), "SAEs") as advance:
        llm = bench.llm_results()
        at_once = bench.tasks.at_once(plan.experiment.train.d_sae)
        for first in range(0, len(saes), at_once):
            failed |= bench.evaluate_together(saes[first : first + at_once], llm, advance)
            if stop.is_set():
                raise InterruptedRunError(STOPPED)
    return failed


class _Bench:
    """One layer's stores, opened once, and the measurements made on them."""

    def __init__(self, plan: Plan, layer: int, workspace: Workspace):
        self.plan, self.layer, self.workspace = plan, layer, workspace
        self.experiment: Experiment = plan.experiment
        self.store = ActivationStore(workspace.storage(plan.store))
        _, self.heldout = split_shards(self.store, self.experiment.train.heldout_shards)
        self._spliced: loss.SplicedLoss | None = None
        self.tasks = ProbeTasks(
            documents={
                dataset: Documents(ActivationStore(workspace.storage(artefact)), layer)
                for dataset, artefact in plan.probes.items()
            },
            k_values=self.experiment.evaluate.k_values,
            seed=self.experiment.probes.seed,
        )

    def llm_results(self) -> dict[str, probing.Accuracies]:
        """Probing results of the residual stream itself, from the workspace if they are there; {} without probes."""
        if not self.tasks.documents:
            return {}
        artefact = self.plan.llm_probing[self.layer]
        with self.workspace.lock(artefact) as folder:
            if self.workspace.manifest(artefact) is None:
                results = self.tasks.of_model()
                _write(folder, LLM_PROBING, results)
                self.workspace.publish(artefact, facts={"datasets": list(results)})
        return json.loads(self.workspace.verified(artefact, LLM_PROBING).read_text(encoding="utf-8"))

    def evaluate_together(
        self, group: list[PlannedSAE], llm: dict[str, probing.Accuracies], advance: Advance
    ) -> dict[str, str]:
        """Evaluate SAEs that are probed side by side, each under its lock until all of them are published.

        Returns those whose files are damaged, and how.
        """
        with ExitStack() as locks:
            # One order for everybody, or two processes could wait for each other.
            for planned in sorted(group, key=lambda planned: planned.evaluation.name):
                locks.enter_context(self.workspace.lock(planned.evaluation))
            saes: list[tuple[PlannedSAE, SAE]] = []
            parents: dict[str, str] = {}
            damaged: dict[str, str] = {}
            for planned in group:
                if self.workspace.manifest(planned.evaluation) is None:
                    parents |= self.workspace.makings([planned.artefact, *([planned.baseline] if planned.baseline else [])])
                    try:
                        saes.append((planned, open_sae(planned.artefact, self.workspace)))
                    except CorruptArtefactError as error:
                        damaged[str(planned)] = str(error)
            started = time.monotonic()
            scores = self.tasks.of_saes([sae for _, sae in saes])
            seconds_each = (time.monotonic() - started) / max(1, len(saes))
            if stop_requested().is_set():
                raise InterruptedRunError(STOPPED)  # now, not after everything else was measured for nothing
            for (planned, sae), scored in zip(saes, scores, strict=True):
                self._evaluate(planned, sae, llm, scored, parents, seconds_each)
                advance(1, planned.arm)
            advance(len(group) - len(saes))
            return damaged

    def _evaluate(
        self,
        planned: PlannedSAE,
        sae: SAE,
        llm: dict[str, probing.Accuracies],
        scored: Future[dict[str, probing.Accuracies]],
        makings: Mapping[str, str],
        probing_seconds: float,
    ) -> None:
        """Measure one probed SAE and publish its evaluation."""
        started = time.monotonic() - probing_seconds
        folder = self.workspace.folder(planned.evaluation)
        self.workspace.reopen(planned.evaluation)  # an evaluation that is out of date must not look damaged meanwhile
        for leftover in folder.iterdir():
            leftover.unlink()
        degenerate: str | None = None
        with torch.no_grad():
            try:
                reconstruction = self._reconstruct(sae, folder)
                if isinstance(self.experiment.model, SyntheticModel):
                    _write(folder, GROUND_TRUTH, self._recover(sae))
                behaviour = self._pairs(planned, sae, reconstruction, folder)
                _write(folder, LOSS, self._loss(sae, reconstruction))
                _write(folder, EXAMPLES, self._examples(sae, behaviour))
                if self.tasks.documents:
                    config = json.loads(self.workspace.verified(planned.artefact, CONFIG).read_text(encoding="utf-8"))
                    _write(
                        folder,
                        SPARSE_PROBING,
                        probing.saebench_output(llm, scored.result(), self._saebench_config(), config),
                    )
                elif not reconstruction.l0:
                    raise DegenerateSAEError("no latent fires on any held-out row")
            except DegenerateSAEError as error:
                degenerate = str(error)
        self.workspace.publish(
            planned.evaluation,
            parents={parent.path: makings[parent.path] for parent in (planned.artefact, planned.baseline) if parent},
            facts={"degenerate": degenerate, "seconds": round(time.monotonic() - started, 1)},
        )

    def _reconstruct(self, sae: SAE, folder: Path) -> Reconstruction:
        reconstruction = Reconstruction(sae)
        for x_BD in self._heldout_rows():
            reconstruction.update(x_BD, sae.encode(x_BD))
        _write(folder, RECONSTRUCTION, reconstruction.compute())
        return reconstruction

    def _pairs(self, planned: PlannedSAE, sae: SAE, seen: Reconstruction, folder: Path) -> Behaviour:
        """Measure pairs of latents: one round through their blocks for both capture and interference."""
        config = self.experiment.evaluate
        own = Interference(sae, SimilarPairs(sae.W_dec_FD, config.capture_topk))
        baseline, reason = self._baseline(planned)
        fixed = Interference(sae, SimilarPairs(baseline.W_dec_FD, config.capture_topk)) if baseline else None

        def measured() -> Iterator[PairBlock]:
            for block in pair_blocks(sae, self._heldout_rows):
                for interference in (own, fixed) if fixed else (own,):
                    interference.update(block)
                yield block

        captured = self._captured(sae, measured(), seen.fired_F, seen.rows)
        null = random_tied(sae, next(self._heldout_rows()), seen.l0)
        null_fired_F = firings(null, self._heldout_rows)
        of_null = self._captured(null, pair_blocks(null, self._heldout_rows), null_fired_F, seen.rows).compute()
        _write(folder, CAPTURE, captured.compute() | {"null": of_null})

        total = float(seen.reconstructed)
        if not total:
            reason = "no latent fires on any held-out row"
        same = {"same_direction": same_direction(sae.W_dec_FD, baseline.W_dec_FD)} if baseline else {}
        fixed_set = fixed.compute(total) | same if fixed else None
        _write(folder, INTERFERENCE, {"own": own.compute(total), "fixed": fixed_set, "reason": reason})
        pairs_F, captured_F = captured.by_latent(sae.d_sae)
        return Behaviour(density_F=seen.fired_F.double() / seen.rows, pairs_F=pairs_F, captured_F=captured_F)

    def _captured(self, sae: SAE, blocks: Iterator[PairBlock], fired_F: torch.Tensor, rows: int) -> Capture:
        config = self.experiment.evaluate
        together = fire_together(
            blocks,
            fired_F,
            rows,
            live_firings=config.live_firings,
            joint_firings=config.joint_firings,
            most=max(PAIRS_CURVE),
        )
        return Capture(sae.W_dec_FD, together, config)

    def _baseline(self, planned: PlannedSAE) -> tuple[SAE | None, str | None]:
        """The SAE on whose pairs all arms of a seed are measured, or why there is none."""
        if planned.baseline is None:
            return None, "the study has no arm `baseline`"
        try:
            if self.workspace.manifest(planned.baseline) is None:
                return None, "the arm `baseline` of this seed is not trained"
            return open_sae(planned.baseline, self.workspace), None
        except CorruptArtefactError as error:
            return None, f"the arm `baseline` of this seed is damaged: {error}"

    def _loss(self, sae: SAE, seen: Reconstruction) -> dict[str, Any]:
        tokens = self.experiment.evaluate.loss_tokens
        if isinstance(self.experiment.model, SyntheticModel):
            return loss.not_measured("a synthetic model has no loss")
        if not tokens:
            return loss.not_measured("evaluate.loss_tokens is 0")
        if self._spliced is None:
            tokens_SL, rows_SL = loss.heldout_sequences(self.store, self.heldout, tokens)
            if not len(tokens_SL):
                return loss.not_measured("no whole sequence is held out")
            name, revision = study_model(self.plan, self.workspace)
            model = LanguageModel(name, revision=revision, dtype=self.experiment.model.dtype)
            self._spliced = loss.SplicedLoss(model, self.layer, tokens_SL, rows_SL, seen.mean_D)
        return self._spliced.compute(sae)

    def _examples(self, sae: SAE, behaviour: Behaviour) -> dict[str, Any]:
        if isinstance(self.experiment.model, SyntheticModel):
            return {"latents": [], "reason": "a synthetic model reads no text"}
        return {"latents": self._texts.of(sae, behaviour), "reason": None}

    @cached_property
    def _texts(self) -> Examples:
        name, revision = study_model(self.plan, self.workspace)
        return Examples(self.store, self.layer, self.heldout, load_tokenizer(name, revision))

    def _recover(self, sae: SAE) -> dict[str, Any]:
        assert self.plan.model is not None
        truth = GroundTruth.load(self.workspace.verified(self.plan.model, FEATURES))
        true_rows = (f_BT for shard in self.heldout for f_BT, _ in truth.draw(self.store.layout, shard))
        recovery = Recovery(sae, truth)
        for x_BD, f_BT in zip(self._heldout_rows(), true_rows, strict=True):
            recovery.update(sae.encode(x_BD), f_BT)
        return recovery.compute(self.experiment.evaluate)

    def _heldout_rows(self) -> Iterator[torch.Tensor]:
        return rows_in_order(self.store, self.layer, self.heldout)

    def _saebench_config(self) -> dict[str, Any]:
        probes, evaluation = self.experiment.probes, self.experiment.evaluate
        return {
            "random_seed": probes.seed,
            "dataset_names": list(self.plan.probes),
            "probe_train_set_size": probes.train_size,
            "probe_test_set_size": probes.test_size,
            "context_length": probes.context,
            "sae_batch_size": probing.POOLING_BATCH,
            "llm_batch_size": self.experiment.store.forward_batch,
            "llm_dtype": self.experiment.model.dtype,
            "model_name": self.plan.model.name if self.plan.model else getattr(self.experiment.model, "name", ""),
            "k_values": list(evaluation.k_values),
        }


def _write(folder: Path, name: str, value: Any) -> None:
    write_atomically(folder / name, json.dumps(value, indent=1, allow_nan=False).encode())
