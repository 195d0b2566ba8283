"""Runs the evaluation stage: probes the model itself once per layer, then computes every evaluation for every SAE."""

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.storage import write_atomically
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import (
    CorruptArtefactError,
    DegenerateSAEError,
    EvaluationError,
    InterruptedRunError,
    MissingArtefactError,
)
from pipeline.evaluate.bench import Bench, LayerBench, ProbeScores
from pipeline.evaluate.reconstruction import measure_reconstruction
from pipeline.evaluate.tasks import STOPPED, Scores
from pipeline.runtime.interrupt import stop_requested
from pipeline.runtime.memory import memory_needed
from pipeline.runtime.progress import Advance, progress
from pipeline.sae.finished import open_sae
from pipeline.sae.sae import SAE
from pipeline.study.evaluations import EVALUATIONS, Need
from pipeline.study.plan import Plan
from pipeline.study.planned import PlannedSAE
from pipeline.study.saebench_section import check_needs
from pipeline.study.stage_code import imported

LLM_PROBING = "llm_probing.json"


@dataclass(kw_only=True)
class Evaluated:
    """The outcome of one run of the stage."""

    made: list[PlannedSAE] = field(default_factory=list[PlannedSAE])
    """SAEs of which something was evaluated."""
    paths: list[str] = field(default_factory=list[str])
    """The artefacts that were made."""
    degenerate: dict[str, str] = field(default_factory=dict[str, str])
    """Every degenerate SAE of the plan, evaluated now or earlier, and why it is."""
    untrained: list[str] = field(default_factory=list[str])
    """SAEs of the plan that do not exist yet."""
    failed: dict[str, str] = field(default_factory=dict[str, str])
    """SAEs that could not be loaded, such as one with damaged files, and why."""


def evaluate(plan: Plan, workspace: Workspace) -> Evaluated:
    """Evaluate every trained SAE that is not evaluated yet.

    Raises MissingArtefactError when no SAE of the plan is trained.
    """
    missing = unmeasured(plan, workspace)
    for name in plan.experiment.evaluate.saebench if missing else ():
        check_needs(name)
    result = Evaluated(untrained=[str(sae) for sae in plan.saes if not _is_there(sae, workspace)])
    for layer in dict.fromkeys([sae.layer for sae in missing] + unprobed(plan, workspace)):
        # By seed, so that what is the same beside a baseline is computed once.
        chosen = sorted((sae for sae in missing if sae.layer == layer), key=lambda sae: (sae.seed, sae.sparsity or 0.0))
        lacking = {str(sae): _lacking(sae, workspace) for sae in chosen}
        result.failed |= evaluate_layer(plan, layer, chosen, workspace)
        result.made += [sae for sae in chosen if str(sae) not in result.failed]
        wanted = [artefact.path for sae in chosen for artefact in lacking[str(sae)]]
        result.paths += [path for path in wanted if workspace.fingerprint(path)]
    for sae in plan.saes:
        manifest = workspace.manifest(sae.evaluation)
        if manifest and manifest.facts["degenerate"]:
            result.degenerate[str(sae)] = manifest.facts["degenerate"]
    return result


def unmeasured(plan: Plan, workspace: Workspace) -> list[PlannedSAE]:
    """The SAEs that are trained and lack an evaluation. Raises MissingArtefactError when no SAE of the plan is trained."""
    trained = [sae for sae in plan.saes if _is_there(sae, workspace)]
    if not trained:
        raise MissingArtefactError(
            f"no SAE of {plan.experiment.name} is trained yet; run: dasae train {plan.experiment.argument}"
        )
    return [sae for sae in trained if _lacking(sae, workspace)]


def _lacking(sae: PlannedSAE, workspace: Workspace) -> list[Artefact]:
    """The evaluations of a trained SAE that can be made and are not."""
    apart = [artefact for name, artefact in sae.apart.items() if _can_be_made(name, sae, workspace)]
    return [artefact for artefact in (sae.evaluation, *apart) if workspace.manifest(artefact) is None]


def _can_be_made(name: str, sae: PlannedSAE, workspace: Workspace) -> bool:
    if EVALUATIONS[name].control and sae.control and not _is_there(sae.control, workspace):
        return False
    return not EVALUATIONS[name].siblings or all(workspace.manifest(sibling) for sibling in sae.siblings)


def unprobed(plan: Plan, workspace: Workspace) -> list[int]:
    """Layers with trained SAEs in which the model itself is not probed."""
    layers = dict.fromkeys(sae.layer for sae in plan.saes if _is_there(sae, workspace))
    return [layer for layer in layers if layer in plan.llm_probing and workspace.manifest(plan.llm_probing[layer]) is None]


def _is_there(sae: PlannedSAE, workspace: Workspace) -> bool:
    """True if an SAE exists. A damaged one counts: it fails when it is loaded, and the others go on."""
    try:
        return workspace.manifest(sae.artefact) is not None
    except CorruptArtefactError:
        return True


def evaluate_layer(plan: Plan, layer: int, saes: list[PlannedSAE], workspace: Workspace) -> dict[str, str]:
    """Evaluate SAEs of one layer, opening that layer's stores once. Returns the SAEs that could not be loaded, and why."""
    for artefact in (plan.store, *plan.probes.values()):
        workspace.require(artefact, f"dasae extract {plan.experiment.argument}")
    bench = LayerBench(plan, layer, workspace)
    failed: dict[str, str] = {}
    stop = stop_requested()
    together = [sae for sae in saes if workspace.manifest(sae.evaluation) is None]
    number = len(together) + sum(len(sae.apart) for sae in saes)
    with progress(f"evaluate layer {layer}", number, "evaluations") as advance:
        model_scores = probe_model(bench)
        at_once = bench.tasks.at_once(plan.experiment.model.d_in, plan.experiment.train.d_sae)
        for first in range(0, len(together), at_once):
            group = together[first : first + at_once]
            with memory_needed(f"evaluating {len(group)} SAEs"):
                failed |= evaluate_together(bench, group, model_scores, advance)
            if stop.is_set():
                raise InterruptedRunError(STOPPED)
        for sae in saes:
            if str(sae) not in failed and (why := evaluate_apart(bench, sae, advance)):
                failed[str(sae)] = why
            if stop.is_set():
                raise InterruptedRunError(STOPPED)
    return failed


def probe_model(bench: LayerBench) -> Scores:
    """Probe scores of the residual stream itself, by data set, published as an artefact of their own; {} without probes."""
    if Need.probes not in bench.has:
        return {}
    artefact, workspace = bench.plan.llm_probing[bench.layer], bench.workspace
    with workspace.lock(artefact) as folder:
        if workspace.manifest(artefact) is None:
            scores = bench.tasks.of_model()
            _write(folder / LLM_PROBING, scores)
            workspace.publish(artefact, files=[LLM_PROBING], facts={"datasets": list(scores)})
    return json.loads(workspace.verified(artefact, LLM_PROBING).read_text(encoding="utf-8"))


def evaluate_together(bench: LayerBench, group: list[PlannedSAE], model_scores: Scores, advance: Advance) -> dict[str, str]:
    """Evaluate SAEs that are probed side by side. Their locks are held until the last is published.

    Returns the SAEs with damaged files, each with the damage.
    """
    workspace = bench.workspace
    with ExitStack() as locks:
        # All processes take locks in the same order, or two could wait for each other.
        for planned in sorted(group, key=lambda planned: planned.evaluation.name):
            locks.enter_context(workspace.lock(planned.evaluation))
        saes: list[tuple[PlannedSAE, SAE]] = []
        parents: dict[str, str] = {}
        damaged: dict[str, str] = {}
        for planned in group:
            if workspace.manifest(planned.evaluation) is None:
                parents |= workspace.fingerprints([planned.artefact, *([planned.baseline] if planned.baseline else [])])
                try:
                    saes.append((planned, open_sae(planned.artefact, workspace).to(bench.device)))
                except CorruptArtefactError as error:
                    damaged[str(planned)] = str(error)
        started = time.monotonic()
        scores = bench.tasks.of_saes([sae for _, sae in saes])
        seconds_each = (time.monotonic() - started) / max(1, len(saes))
        if stop_requested().is_set():
            raise InterruptedRunError(STOPPED)  # now: some scores may be missing, and the rest takes long
        for (planned, sae), scored in zip(saes, scores, strict=True):
            on = Bench(bench, planned, sae, ProbeScores(model=model_scores, sae=scored))
            _evaluate(on, parents, seconds_each)
            for name in planned.apart:  # now, with what was measured just now
                if EVALUATIONS[name].rows and _can_be_made(name, planned, workspace):
                    _compute_apart(bench, planned, name, on)
            advance(1, planned.arm)
        advance(len(group) - len(saes))
        return damaged


def evaluate_apart(bench: LayerBench, planned: PlannedSAE, advance: Advance) -> str | None:
    """Compute what has an artefact of its own and is missing. Returns why something failed: the rest is made."""
    failed: list[str] = []
    for name in planned.apart:
        if stop_requested().is_set():
            break  # the caller says so; what is made stays
        if _can_be_made(name, planned, bench.workspace) and (why := _compute_apart(bench, planned, name)):
            failed.append(why)
        advance(1, f"{name} of {planned.arm}")
    return "; ".join(failed) or None


def _compute_apart(bench: LayerBench, planned: PlannedSAE, name: str, on: Bench | None = None) -> str | None:
    """Compute one of these evaluations unless it is there, with the SAE's bench if it is open. Returns why it failed."""
    workspace, artefact, evaluation = bench.workspace, planned.apart[name], EVALUATIONS[name]
    with workspace.lock(artefact) as folder:
        if workspace.manifest(artefact):
            return None
        others = [*planned.siblings] if evaluation.siblings else []
        others += [planned.evaluation] if evaluation.rows else []
        others += [planned.control.artefact] if evaluation.control and planned.control else []
        started, parents = time.monotonic(), workspace.fingerprints([planned.artefact, *others])
        degenerate = workspace.require(planned.evaluation, "dasae evaluate").facts["degenerate"]
        files: list[str] = []
        if degenerate is None:
            try:
                if on is None:
                    sae = open_sae(planned.artefact, workspace).to(bench.device)
                    on = Bench(bench, planned, sae, ProbeScores(model={}, sae=None))
                with torch.no_grad(), memory_needed(f"{name} of {planned}"):
                    value = imported(evaluation.compute)(on)
            except (CorruptArtefactError, EvaluationError) as error:
                return str(error)
            workspace.reopen(artefact)
            _write(folder / evaluation.file, value)
            files.append(evaluation.file)
        seconds = round(time.monotonic() - started, 1)
        workspace.publish(artefact, files=files, parents=parents, facts={"degenerate": degenerate, "seconds": seconds})
    return None


def _evaluate(on: Bench, parents: Mapping[str, str], probing_seconds: float) -> None:
    """Compute and publish the evaluation of one probed SAE."""
    started = time.monotonic() - probing_seconds
    planned, workspace = on.planned, on.layer.workspace
    folder = workspace.folder(planned.evaluation)
    workspace.reopen(planned.evaluation)  # an outdated evaluation must not look damaged while its files are replaced
    for leftover in folder.iterdir():
        leftover.unlink()
    written: list[str] = []
    try:
        write_evaluations(on, folder, written)
        degenerate = None
    except DegenerateSAEError as error:
        degenerate = str(error)
    workspace.publish(
        planned.evaluation,
        files=written,
        parents={parent.path: parents[parent.path] for parent in (planned.artefact, planned.baseline) if parent},
        facts={"degenerate": degenerate, "seconds": round(time.monotonic() - started, 1)},
    )


@torch.no_grad()
def write_evaluations(on: Bench, folder: Path, written: list[str]) -> None:
    """Compute the evaluations in the order of their table, each into its file, except those whose needs the study lacks.

    `written` gets the name of each file. Raises DegenerateSAEError; the files of earlier evaluations are written by then.
    """
    entries = [entry for entry in EVALUATIONS.values() if entry.apart is None and entry.needs <= on.layer.has]
    functions = [imported(evaluation.compute) for evaluation in entries]  # before any work: a name may be wrong
    for evaluation, compute in zip(entries, functions, strict=True):
        _write(folder / evaluation.file, compute(on))
        written.append(evaluation.file)
    # In a study with probe texts, probing has already refused such an SAE.
    if Need.probes not in on.layer.has and not on.once(measure_reconstruction).l0:
        raise DegenerateSAEError("no latent fires on any held-out row")


def _write(path: Path, value: Any) -> None:
    write_atomically(path, json.dumps(value, indent=1, allow_nan=False).encode())
