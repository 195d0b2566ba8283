"""The evaluation stage: what the model itself knows of the probe tasks, once; then every SAE, each by its own artefact."""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import DegenerateSAEError, MissingArtefactError
from pipeline.evaluate import probing
from pipeline.evaluate.capture import CoActivation, capture, random_tied
from pipeline.evaluate.reconstruction import Reconstruction
from pipeline.evaluate.recovery import Recovery
from pipeline.experiment import Experiment
from pipeline.ground_truth import FEATURES, GroundTruth
from pipeline.plan import CAPTURE, GROUND_TRUTH, RECONSTRUCTION, SPARSE_PROBING, Plan, PlannedSAE
from pipeline.progress import progress
from pipeline.sae import CONFIG, SAE, WEIGHTS
from pipeline.sources import SyntheticModel
from pipeline.store.batches import rows_in_order, split_shards
from pipeline.store.documents import Documents
from pipeline.store.reader import ActivationStore
from pipeline.workspace import Workspace, write_atomically

LLM_PROBING = "llm_probing.json"


@dataclass(kw_only=True)
class Evaluated:
    """What a run of the stage did."""

    made: list[PlannedSAE] = field(default_factory=list)
    degenerate: dict[str, str] = field(default_factory=dict)
    """Every degenerate SAE of the plan, evaluated now or earlier, and why it is."""
    untrained: list[str] = field(default_factory=list)
    """SAEs of the plan that do not exist, so that there was nothing to evaluate."""


def evaluate(plan: Plan, workspace: Workspace) -> Evaluated:
    """Evaluate every trained SAE that was not evaluated yet.

    Raises MissingArtefactError when no SAE of the plan was trained.
    """
    trained = [sae for sae in plan.saes if workspace.manifest(sae.artefact)]
    if not trained:
        raise MissingArtefactError(
            f"no SAE of {plan.experiment.name} is trained yet; run: dasae train {plan.experiment.argument}"
        )
    result = Evaluated(untrained=[str(sae) for sae in plan.saes if sae not in trained])
    missing = [sae for sae in trained if workspace.manifest(sae.evaluation) is None]
    for layer in dict.fromkeys(sae.layer for sae in missing):
        chosen = [sae for sae in missing if sae.layer == layer]
        evaluate_layer(plan, layer, chosen, workspace)
        result.made += chosen
    for sae in plan.saes:
        manifest = workspace.manifest(sae.evaluation)
        if manifest and manifest.facts["degenerate"]:
            result.degenerate[str(sae)] = manifest.facts["degenerate"]
    return result


def evaluate_layer(plan: Plan, layer: int, saes: list[PlannedSAE], workspace: Workspace) -> None:
    """Evaluate SAEs of one layer, reading that layer's probe activations once."""
    for artefact in (plan.store, *plan.probes.values()):
        workspace.require(artefact, f"dasae extract {plan.experiment.argument}")
    bench = _Bench(plan, layer, workspace)
    with progress(f"evaluate layer {layer}", len(saes), "SAEs") as advance:
        llm = bench.llm_results()
        for sae in saes:
            with workspace.lock(sae.evaluation) as folder:
                if workspace.manifest(sae.evaluation) is None:
                    bench.evaluate(sae, llm, folder)
            advance(1, sae.arm)


class _Bench:
    """One layer's stores, opened once, and the measurements made on them."""

    def __init__(self, plan: Plan, layer: int, workspace: Workspace):
        self.plan, self.layer, self.workspace = plan, layer, workspace
        self.experiment: Experiment = plan.experiment
        self.store = ActivationStore(workspace.storage(plan.store))
        _, self.heldout = split_shards(self.store, self.experiment.train.heldout_shards)
        self.documents = {
            dataset: Documents(ActivationStore(workspace.storage(artefact)), layer)
            for dataset, artefact in plan.probes.items()
        }

    def llm_results(self) -> dict[str, probing.Accuracies]:
        """Probing results of the residual stream itself, from the workspace if they are there; {} without probes."""
        if not self.documents:
            return {}
        artefact = self.plan.llm_probing[self.layer]
        with self.workspace.lock(artefact) as folder:
            if self.workspace.manifest(artefact) is None:
                results = self._probe(((name, *self._features(documents)) for name, documents in self.documents.items()))
                _write(folder, LLM_PROBING, results)
                self.workspace.publish(artefact, facts={"datasets": list(results)})
        return json.loads(self.workspace.verified(artefact, LLM_PROBING).read_text(encoding="utf-8"))

    def evaluate(self, planned: PlannedSAE, llm: dict[str, probing.Accuracies], folder: Path) -> None:
        """Measure one SAE and publish its evaluation."""
        started = time.monotonic()
        for leftover in folder.iterdir():
            leftover.unlink()
        sae = SAE.load(self.workspace.verified(planned.artefact, WEIGHTS))
        degenerate: str | None = None
        with torch.no_grad():
            metrics = self._reconstruct(sae, folder)
            _write(folder, RECONSTRUCTION, metrics)
            if isinstance(self.experiment.model, SyntheticModel):
                _write(folder, GROUND_TRUTH, self._recover(sae))
            try:
                if self.documents:
                    sparse = self._probe(self._sae_features(sae))
                    config = json.loads(self.workspace.verified(planned.artefact, CONFIG).read_text(encoding="utf-8"))
                    _write(folder, SPARSE_PROBING, probing.saebench_output(llm, sparse, self._saebench_config(), config))
                elif not metrics["l0"]:
                    raise DegenerateSAEError("no latent fires on any held-out row")
            except DegenerateSAEError as error:
                degenerate = str(error)
        self.workspace.publish(
            planned.evaluation,
            parents=[planned.artefact],
            facts={"degenerate": degenerate, "seconds": round(time.monotonic() - started, 1)},
        )

    def _reconstruct(self, sae: SAE, folder: Path) -> dict[str, float]:
        reconstruction, seen = Reconstruction(sae), CoActivation(sae.d_sae)
        for x_BD in self._heldout_rows():
            f_BF = sae.encode(x_BD)
            reconstruction.update(x_BD, f_BF)
            seen.update(f_BF)
        metrics = reconstruction.compute()
        _write(folder, CAPTURE, self._capture(sae, seen, metrics["l0"]))
        return metrics

    def _capture(self, sae: SAE, seen: CoActivation, l0: float) -> dict[str, Any]:
        config = self.experiment.evaluate
        null = random_tied(sae, next(self._heldout_rows()), l0)
        null_seen = CoActivation(null.d_sae)
        for x_BD in self._heldout_rows():
            null_seen.update(null.encode(x_BD))
        return capture(sae.W_dec_FD, seen, config) | {"null": capture(null.W_dec_FD, null_seen, config)}

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

    def _features(self, documents: Documents, sae: SAE | None = None) -> tuple[probing.Features, probing.Features]:
        encode = sae.encode if sae else None
        return probing.pool(documents.padded("train"), encode), probing.pool(documents.padded("test"), encode)

    def _sae_features(self, sae: SAE) -> list[tuple[str, probing.Features, probing.Features]]:
        features = [(name, *self._features(documents, sae)) for name, documents in self.documents.items()]
        for name, train, _ in features:
            probing.check_not_degenerate(name, train, self.experiment.evaluate.k_values)
        return features

    def _probe(self, features: Any) -> dict[str, probing.Accuracies]:
        return probing.probe(features, self.experiment.evaluate.k_values, self.experiment.probes.seed)

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
