"""The results of a study as plain data, gathered from the artefacts in the workspace."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import pipeline
from pipeline.artefacts.manifest import Artefact, Manifest
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import MissingArtefactError
from pipeline.models.model_section import HuggingFaceModel, SyntheticModel, TinyModel
from pipeline.report.current import made_of
from pipeline.report.differences import differences
from pipeline.report.metrics import RECONSTRUCTED
from pipeline.store.reader import ActivationStore
from pipeline.study.arms import arms_of
from pipeline.study.evaluations import EVALUATIONS
from pipeline.study.plan import TRAINING_LOG, Plan
from pipeline.study.planned import PlannedSAE
from pipeline.texts.text_sections import CorpusConfig, FilesCorpus

NOT_PROBED: dict[str, Any] = dict.fromkeys(
    ("sparse_probing", "llm_probing", "sparse_probing_by_task", "llm_probing_by_task")
)
SHAPES = ("density", "decoder_cosine")
LOSSES = ("clean", "sae", "zero", "mean", "reason")
CURVES = ("step", "fvu", "l0", "dead_fraction")
RATES = ("row", "column", "union", "mutual", "chance", "lift", "kappa", "strength_weighted", "live", "pairs", "reason")
CAPTURE_CURVES = {"by_topk": "topk", "by_pairs": "q"}
EXAMPLES_OF = ("full", "baseline")
"""Arms whose latents the report shows; of a study with neither, the first arm's."""

GEMMA = "google/gemma-2-2b"
REPORTED_LLM_PROBING = {
    "1": 0.684275, "2": 0.7260625, "5": 0.774625, "10": 0.82099375, "20": 0.8589375, "50": 0.90028125, "all": 0.939325
}  # fmt: skip
"""Sparse probing of GEMMA's own activations in the log that the method comes from; it names no layer for them."""


def collect(plan: Plan, workspace: Workspace) -> dict[str, Any]:
    """Everything the report shows: one entry of `rows` per evaluated SAE, and what was done to get there.

    Raises MissingArtefactError when nothing of the study was evaluated yet.
    """
    experiment = plan.experiment
    seen = _Seen(workspace)
    evaluated = [sae for sae in plan.saes if seen.manifest(sae.evaluation)]
    if not evaluated:
        raise MissingArtefactError(f"nothing of {experiment.name} is evaluated yet; run: dasae ablate {experiment.argument}")
    facts = workspace.require(plan.store, f"dasae extract {experiment.argument}").facts
    known = arms_of(experiment.arms)
    arms = {sae.arm: known[sae.arm] for sae in plan.saes}
    results = {
        "experiment": experiment.name,
        "description": experiment.description,
        "generated": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": pipeline.__version__,
        "made_of": made_of(plan, workspace),
        "is_demo": isinstance(experiment.model, TinyModel),
        "is_synthetic": isinstance(experiment.model, SyntheticModel),
        "model": _model(plan, workspace),
        "reported_llm_probing": REPORTED_LLM_PROBING if experiment.model.name == GEMMA else None,
        "store": {
            "key": plan.store.key,
            "rows": facts["rows"],
            "bytes": facts["bytes"],
            "layers": list(experiment.store.layers),
            "context": experiment.store.context,
            "d_in": facts["d_in"],
            "seconds": facts["seconds"],
            "corpus": _corpus_name(experiment.corpus),
        },
        "tasks": [_task(plan, name, artefact, workspace) for name, artefact in plan.probes.items()],
        "training": experiment.train.model_dump() | {"heldout_rows": _heldout_rows(plan, workspace)},
        "arms": [
            {"arm": name, "run": arm.run, "question": arm.question, "base": None if name == "full" else arm.base}
            for name, arm in arms.items()
        ],
        "k_values": list(experiment.evaluate.k_values),
        "rows": [_row(sae, seen) for sae in evaluated],
        "curves": [_curve(sae, seen) for sae in evaluated],
        "missing": [str(sae) for sae in plan.saes if sae not in evaluated],
        "examples": [_examples(sae, seen) for sae in _shown(evaluated, seen)],
        "cost": _cost(plan, evaluated, seen),
    }
    return results | {"differences": differences(results)}


def _corpus_name(corpus: CorpusConfig) -> str:
    return ", ".join(corpus.paths) if isinstance(corpus, FilesCorpus) else getattr(corpus, "name", corpus.source)


def _model(plan: Plan, workspace: Workspace) -> dict[str, Any]:
    model = plan.experiment.model
    if isinstance(model, HuggingFaceModel):
        return {
            "name": model.name,
            "facts": {"revision": model.revision or "a folder", "depth": model.depth, "dtype": model.dtype},
        }
    assert plan.model is not None
    return {"name": model.name, "facts": workspace.require(plan.model, f"dasae extract {plan.experiment.argument}").facts}


def _task(plan: Plan, name: str, artefact: Artefact, workspace: Workspace) -> dict[str, Any]:
    probes = plan.experiment.probes
    classes = ActivationStore(workspace.storage(artefact)).layout.classes
    return {"name": name, "classes": list(classes), "train_size": probes.train_size, "test_size": probes.test_size}


def _heldout_rows(plan: Plan, workspace: Workspace) -> int:
    store = ActivationStore(workspace.storage(plan.store))
    return sum(store.commits[shard].rows for shard in store.shards[-plan.experiment.train.heldout_shards :])


def _row(sae: PlannedSAE, seen: "_Seen") -> dict[str, Any]:
    trained, evaluated = seen.manifest(sae.artefact), seen.manifest(sae.evaluation)
    assert trained
    assert evaluated
    row: dict[str, Any] = {
        "arm": sae.arm,
        "seed": sae.seed,
        "layer": sae.layer,
        "steps": trained.facts["steps"],
        "tokens": trained.facts["tokens"],
        "resets": trained.facts["resets"],
        "seconds": trained.facts["seconds"],
        "sae": sae.artefact.key,
        "degenerate": evaluated.facts["degenerate"],
    }
    from_reconstruction = [metric.name for metric in RECONSTRUCTED] + [*SHAPES]
    if row["degenerate"]:
        return row | NOT_PROBED | dict.fromkeys((*from_reconstruction, "loss", "interference", "bpcr", "ground_truth"))
    reconstruction, loss, interference = (
        seen.read(sae.evaluation, EVALUATIONS[name].file) for name in ("reconstruction", "loss", "interference")
    )
    probing, truth = EVALUATIONS["sparse_probing"].file, EVALUATIONS["ground_truth"].file
    return row | {
        # An evaluation made before a metric was added does not have it.
        **{name: reconstruction.get(name) for name in from_reconstruction},
        "loss": {name: loss[name] for name in LOSSES}
        | {f"recovered_{null}": (loss["recovered"] or {}).get(null) for null in ("zero", "mean")},
        "interference": interference,
        **(_probing(seen.read(sae.evaluation, probing)) if probing in evaluated.files else NOT_PROBED),
        "bpcr": _capture(seen.read(sae.evaluation, EVALUATIONS["capture"].file)),
        "ground_truth": seen.read(sae.evaluation, truth) if truth in evaluated.files else None,
    }


def _capture(capture: Mapping[str, Any]) -> dict[str, Any]:
    """Rates of the SAE with both nulls beside them, at the K and q of the study and along both curves."""

    def curve(name: str, along: str) -> list[dict[str, Any]]:
        nulls = {point[along]: point["union"] for point in capture["null"][name]}
        return [
            {along: at, "union": point["union"], "chance": point["chance"], "random_tied": nulls[at]}
            for point in capture[name]
            for at in [point[along]]
        ]

    return {
        **{name: capture[name] for name in RATES},
        "random_tied": capture["null"]["union"],
        "permuted": (capture["permuted"] or {}).get("mean"),
        "permuted_std": (capture["permuted"] or {}).get("std"),
        **{f"phi_{name}": capture["phi"][name] for name in ("union", "chance", "lift")},
        "phi_random_tied": capture["null"]["phi"]["union"],
        **{name: curve(name, along) for name, along in CAPTURE_CURVES.items()},
    }


def _shown(evaluated: list[PlannedSAE], seen: "_Seen") -> list[PlannedSAE]:
    """The SAEs whose latents the report shows: per layer, the first seed of each arm of EXAMPLES_OF that is sound."""
    sound: dict[tuple[int, str], PlannedSAE] = {}
    for sae in evaluated:
        manifest = seen.manifest(sae.evaluation)
        if manifest and manifest.facts["degenerate"] is None:
            sound.setdefault((sae.layer, sae.arm), sae)
    shown: list[PlannedSAE] = []
    for layer in dict.fromkeys(layer for layer, _ in sound):
        arms = {arm: sae for (at, arm), sae in sound.items() if at == layer}
        shown += [arms[arm] for arm in EXAMPLES_OF if arm in arms] or list(arms.values())[:1]
    return shown


def _examples(sae: PlannedSAE, seen: "_Seen") -> dict[str, Any]:
    return {"arm": sae.arm, "seed": sae.seed, "layer": sae.layer} | seen.read(sae.evaluation, EVALUATIONS["examples"].file)


def _probing(bench: Mapping[str, Any]) -> dict[str, Any]:
    """What NOT_PROBED leaves empty, from sae-bench's output."""
    details = {detail["dataset_name"].removesuffix("_results"): detail for detail in bench["eval_result_details"]}
    return {
        "sparse_probing": _by_k(bench["eval_result_metrics"]["sae"], "sae"),
        "llm_probing": _by_k(bench["eval_result_metrics"]["llm"], "llm"),
        "sparse_probing_by_task": {name: _by_k(detail, "sae") for name, detail in details.items()},
        "llm_probing_by_task": {name: _by_k(detail, "llm") for name, detail in details.items()},
    }


def _by_k(metrics: Mapping[str, Any], who: str) -> dict[str, float]:
    """`sae_top_5_test_accuracy` and the like to `5`, `sae_test_accuracy` to `all`; what was not measured is left out."""
    accuracies: dict[str, float] = {}
    for name, value in metrics.items():
        if name.startswith(f"{who}_") and value is not None:
            k = name.removeprefix(f"{who}_").removesuffix("test_accuracy").removeprefix("top_").rstrip("_")
            accuracies[k or "all"] = value
    return accuracies


def _curve(sae: PlannedSAE, seen: "_Seen") -> dict[str, Any]:
    log = seen.text(sae.artefact, TRAINING_LOG)
    records = [json.loads(line) for line in log.splitlines()]
    return {"arm": sae.arm, "seed": sae.seed, "layer": sae.layer} | {
        name: [record[name] for record in records] for name in CURVES
    }


def _cost(plan: Plan, evaluated: list[PlannedSAE], seen: "_Seen") -> dict[str, float]:
    def seconds(artefacts: list[Artefact]) -> float:
        manifests = [seen.manifest(artefact) for artefact in artefacts]
        return round(sum(manifest.facts["seconds"] for manifest in manifests if manifest), 1)

    model = seen.manifest(plan.model) if plan.model else None
    return {
        "model_seconds": round(model.facts["seconds"], 1) if model else 0.0,
        "extract_seconds": seconds([plan.store, *plan.probes.values()]),
        "train_seconds": seconds([sae.artefact for sae in evaluated]),
        "evaluate_seconds": seconds([sae.evaluation for sae in evaluated]),
        "store_bytes": sum(
            ActivationStore(seen.workspace.storage(artefact)).bytes for artefact in (plan.store, *plan.probes.values())
        ),
    }


class _Seen:
    """Artefacts of a workspace, each looked at once."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace
        self.manifests: dict[str, Manifest | None] = {}

    def manifest(self, artefact: Artefact) -> Manifest | None:
        """Its manifest; None while it is still to be made."""
        if artefact.path not in self.manifests:
            self.manifests[artefact.path] = self.workspace.manifest(artefact)
        return self.manifests[artefact.path]

    def text(self, artefact: Artefact, name: str) -> str:
        """One of its files, verified."""
        return self.workspace.verified(artefact, name, self.manifest(artefact)).read_text(encoding="utf-8")

    def read(self, artefact: Artefact, name: str) -> dict[str, Any]:
        """One of its JSON files, verified."""
        return json.loads(self.text(artefact, name))
