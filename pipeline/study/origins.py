"""Lists the sources of a study's SAEs, and copies SAEs that others trained into the workspace.

The first source is training here, by an arm. SAEs from any other source are evaluated and shown in the same way, but they
are not trained here and appear in no paired difference.
"""

import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError, CorruptArtefactError
from pipeline.models.model_section import KnownFeatures
from pipeline.study.arms import NAME
from pipeline.study.evaluations import EVALUATIONS, Need
from pipeline.study.experiment import Experiment
from pipeline.study.planned import PlannedSAE, TrainedSAE

SAE_FORMAT = 2
CONTRAST_FORMAT = 2
"""Of SAEs under the weighted contrast alone. 2: on a CPU it is computed from the latents that fire, which costs less."""
EVALUATION_FORMAT = 6
"""Format numbers. Increase one when a change of code changes the bytes of such an artefact."""

TRAINED = "trained"
REFERENCE = "reference"
BASELINE = "baseline"
"""The arm whose pairs of latents every arm is measured on."""


@dataclass(frozen=True, kw_only=True)
class Basis:
    """What all SAEs of a study share: the experiment, its activation store and the keys of its probe stores."""

    experiment: Experiment
    store: Artefact
    probes: tuple[str, ...]
    asked: Mapping[str, Mapping[str, Any]] = field(default_factory=dict[str, Mapping[str, Any]])
    """The evaluations of sae-bench that the study asks for, by name: what determines their results beside the SAE."""

    def outside(self, origin: str, name: str, *, layer: int, content: Any) -> PlannedSAE:
        """An SAE that others trained on the residual stream after `layer`.

        `origin` is the name of its source in `ORIGINS`. `name` is what the study calls it. `content` identifies its weights:
        a hash of its files, or a repository and its commit. Raises BadInputError for a name that an arm could not
        have.
        """
        if not NAME.fullmatch(name):
            raise BadInputError(f"{origin}: name {name!r} must be at most 20 lower-case letters, digits, '.', '_' or '-'")
        sae = Artefact(
            kind="saes",
            label=name,
            inputs={"format": SAE_FORMAT, "origin": origin, "layer": layer, "content": content},
        )
        # The key of an SAE that is trained here covers which rows are held out; the key of this one does not.
        heldout = self.experiment.train.canonical(only=("heldout_shards", "heldout_within"))
        rows = {"store": self.store.key, **heldout}
        evaluation = self.evaluation(name, sae, None, rows)
        apart = self.evaluated_apart(name, sae, evaluation)
        return PlannedSAE(origin=origin, arm=name, seed=0, layer=layer, artefact=sae, evaluation=evaluation, apart=apart)

    def trained(self, arm: str, seed: int, layer: int, sparsity: float | None = None) -> TrainedSAE:
        """The SAE that an arm of the study trains, at an L0 where the study has several."""
        recipe = self.experiment.recipes.at(arm, sparsity)
        matched_to = self.trained(recipe.match_l0, seed, layer) if recipe.match_l0 else None
        beside = self.experiment.recipes.control(arm, self.experiment.study.arms)
        control = self.trained(beside, seed, layer, sparsity) if beside else None
        others = [other for other in self.experiment.study.seeds if other != seed]
        # Each seed of a matched arm is matched to an SAE of its own seed, so its key is not known from here.
        siblings = () if matched_to else tuple(self._trained_artefact(arm, other, layer, sparsity) for other in others)
        there = BASELINE in self.experiment.study.arms
        baseline = self._trained_artefact(BASELINE, seed, layer, sparsity) if there else None
        sae = self._trained_artefact(arm, seed, layer, sparsity, matched_to)
        evaluation = self.evaluation(sae.label, sae, baseline)
        return TrainedSAE(
            origin=TRAINED,
            arm=arm,
            seed=seed,
            layer=layer,
            sparsity=sparsity,
            recipe=recipe,
            artefact=sae,
            evaluation=evaluation,
            apart=self.evaluated_apart(sae.label, sae, evaluation, siblings, control),
            siblings=siblings,
            baseline=baseline,
            control=control,
            matched_to=matched_to,
        )

    def _trained_artefact(
        self, arm: str, seed: int, layer: int, sparsity: float | None, matched_to: TrainedSAE | None = None
    ) -> Artefact:
        # `match_l0` is only a name; the key of the SAE that it names, added below, covers that SAE's recipe.
        recipe = self.experiment.recipes.at(arm, sparsity)
        inputs: dict[str, Any] = {
            "format": SAE_FORMAT,
            "store": self.store.key,
            "layer": layer,
            "recipe": recipe.canonical(without=("match_l0",)),
            "seed": seed,
        }
        if recipe.contrast and recipe.contrast.weighted and not recipe.contrast.literal:
            inputs["contrast_format"] = CONTRAST_FORMAT
        if matched_to:
            inputs["matched_to"] = matched_to.artefact.key
        level = "" if sparsity is None else f"-l0-{sparsity:g}"
        return Artefact(kind="saes", label=f"{arm}{level}-s{seed}", inputs=inputs)

    def evaluation(
        self, label: str, sae: Artefact, baseline: Artefact | None, rows: Mapping[str, Any] | None = None
    ) -> Artefact:
        """The evaluation of an SAE; pass `rows`, which rows are held out, if the SAE's key does not cover it."""
        inputs = {
            "format": EVALUATION_FORMAT,
            "sae": sae.key,
            "baseline": baseline.key if baseline else None,
            "probes": self.probes,
            "seed": self.experiment.probes.seed,
            "evaluate": self.experiment.evaluate.canonical(without=("saebench",)),
        }
        return Artefact(kind="evaluations", label=label, inputs=inputs | {"rows": rows} if rows else inputs)

    def evaluated_apart(
        self,
        label: str,
        sae: Artefact,
        whole: Artefact,
        siblings: tuple[Artefact, ...] = (),
        control: PlannedSAE | None = None,
    ) -> dict[str, Artefact]:
        """The evaluations of an SAE that have an artefact of their own, by name. `whole` is the one with all others."""
        found: dict[str, Artefact] = {}
        for name, evaluation in EVALUATIONS.items():
            if evaluation.apart is None or (evaluation.siblings and not siblings) or (evaluation.control and not control):
                continue
            if evaluation.asked and name not in self.asked:
                continue
            if Need.model in evaluation.needs and isinstance(self.experiment.model, KnownFeatures):
                continue
            inputs: dict[str, Any] = {"format": evaluation.apart, "evaluation": name, "sae": sae.key}
            if evaluation.rows:
                inputs["of"] = whole.key
            if evaluation.siblings:
                inputs["siblings"] = sorted(sibling.key for sibling in siblings)
            if evaluation.control and control:
                inputs["control"] = control.artefact.key
            if evaluation.asked:
                inputs |= self.asked[name]
            found[name] = Artefact(kind="evaluations", label=f"{name}-{label}", inputs=inputs)
        return found

    def model_side(self, name: str, layer: int) -> Artefact:
        """What an evaluation of sae-bench takes from the model alone, which all SAEs of a layer share."""
        inputs = {"format": EVALUATIONS[name].apart, "model_side": name, "layer": layer, **self.asked[name]}
        return Artefact(kind="evaluations", label=f"{name}-llm-layer{layer}", inputs=inputs)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """A source of SAEs."""

    plan: Callable[[Basis], Iterable[PlannedSAE]]
    """Returns all SAEs of a study that come from this source. May read files; makes nothing."""
    write: Callable[[PlannedSAE, Path, Experiment], object] | None = None
    """Writes one of these SAEs into an empty folder, in SAELens' format: `cfg.json` and `sae_weights.safetensors`. None for
    SAEs that the training stage makes."""


def _trained(basis: Basis) -> Iterable[PlannedSAE]:
    study = basis.experiment.study
    cells = product(study.layers, study.arms, study.seeds, study.sparsities or (None,))
    return (basis.trained(arm, seed, layer, sparsity) for layer, arm, seed, sparsity in cells)


def _references(basis: Basis) -> Iterable[PlannedSAE]:
    for name, reference in basis.experiment.references.items():
        yield basis.outside(REFERENCE, name, layer=reference.layer, content=reference.content(name))


def _write_reference(sae: PlannedSAE, folder: Path, experiment: Experiment) -> None:
    from pipeline.sae.foreign import check_place, from_registry, from_saelens  # loads torch and SAELens
    from pipeline.sae.formats import write_sae

    reference = experiment.references[sae.arm]
    if reference.release:
        source = f"{reference.release}/{reference.sae_id}"
        theirs, metadata = from_registry(reference.release, str(reference.sae_id), str(reference.revision))
    else:
        source = reference.local()
        theirs, metadata = from_saelens(source)
    check_place(metadata, source, sae.layer, experiment.model.name)
    write_sae(theirs, folder, {**metadata, "arm": sae.arm})


ORIGINS: dict[str, Origin] = {
    TRAINED: Origin(plan=_trained),
    REFERENCE: Origin(plan=_references, write=_write_reference),
}
"""By name, in the order in which a plan lists their SAEs."""


def planned(basis: Basis) -> list[PlannedSAE]:
    """All SAEs of a study. Raises BadInputError when two have the same name, seed and layer."""
    saes = [sae for origin in ORIGINS.values() for sae in origin.plan(basis)]
    first: dict[str, PlannedSAE] = {}
    for sae in saes:
        if (other := first.setdefault(str(sae), sae)) is not sae:
            raise BadInputError(f"two SAEs are called {sae}, from {other.origin!r} and {sae.origin!r}; rename one of them")
    return saes


@dataclass(kw_only=True)
class Brought:
    """The outcome of `bring`."""

    made: list[PlannedSAE] = field(default_factory=list[PlannedSAE])
    failed: dict[str, str] = field(default_factory=dict[str, str])
    """SAEs that cannot be used, and why."""


def bring(saes: Iterable[PlannedSAE], experiment: Experiment, workspace: Workspace) -> Brought:
    """Put SAEs that others trained into the workspace, unless they are there already."""
    brought = Brought()
    for sae in [sae for sae in saes if workspace.manifest(sae.artefact) is None]:
        with workspace.lock(sae.artefact) as folder:
            if workspace.manifest(sae.artefact):
                continue  # another process was faster
            try:
                _publish(sae, folder, experiment, workspace)
            except (BadInputError, CorruptArtefactError) as error:
                shutil.rmtree(folder)
                brought.failed[str(sae)] = str(error)
            else:
                brought.made.append(sae)
    return brought


def _publish(sae: PlannedSAE, folder: Path, experiment: Experiment, workspace: Workspace) -> None:
    from pipeline.sae.formats import CONFIG, WEIGHTS, read_sae  # loads torch

    write = ORIGINS[sae.origin].write
    assert write is not None
    started = time.monotonic()
    shutil.rmtree(folder)  # what an interrupted attempt left
    folder.mkdir()
    write(sae, folder, experiment)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise BadInputError(f"its source {sae.origin!r} has no {name}; add it or remove the SAE")
    brought = read_sae(folder)
    if brought.d_in != experiment.model.d_in:
        wanted = experiment.model.d_in
        raise BadInputError(f"it reads rows of {brought.d_in} numbers, the model's rows have {wanted}; remove it")
    seconds = round(time.monotonic() - started, 1)
    facts = {"origin": sae.origin, "architecture": brought.activation.architecture, "seconds": seconds}
    workspace.publish(sae.artefact, files=[CONFIG, WEIGHTS], facts=facts)
