"""Gives evaluations their inputs, each made once: of one SAE (`Bench`), and of a layer for all its SAEs (`LayerBench`)."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self, TypeVar

from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import CorruptArtefactError, DegenerateSAEError
from pipeline.evaluate.heldout import HeldoutRows, Latents
from pipeline.evaluate.tasks import ProbeTasks, Probing, Scores
from pipeline.models.language import LanguageModel, load_tokenizer
from pipeline.models.model_section import KnownFeatures, SAELensModel
from pipeline.models.synthetic import Truth
from pipeline.runtime.devices import best_device, sae_device
from pipeline.sae.finished import open_sae
from pipeline.sae.formats import CONFIG, read_config
from pipeline.sae.sae import SAE
from pipeline.store.batches import split_shards
from pipeline.store.documents import Documents
from pipeline.store.reader import ActivationStore
from pipeline.study.evaluations import Need
from pipeline.study.plan import Plan
from pipeline.study.planned import PlannedSAE, TrainedSAE
from pipeline.study.sections import EvaluateConfig
from pipeline.study.study_model import open_synthetic_model, study_model

T = TypeVar("T")


@dataclass(frozen=True)
class Missing:
    """Takes the place of what a study lacks and an evaluation can do without. `reason` goes into the evaluation's file."""

    reason: str


class Shared:
    """Remembers results that several evaluations use."""

    def __init__(self) -> None:
        self._results: dict[Callable[..., Any], Any] = {}

    def once(self, compute: Callable[[Self], T]) -> T:
        """`compute(self)`, called the first time and remembered: `on.once(measure_pairs)`."""
        if compute not in self._results:
            self._results[compute] = compute(self)
        return self._results[compute]


class LayerBench(Shared):
    """One layer of a study: its stores, opened once, and the study's model."""

    def __init__(self, plan: Plan, layer: int, workspace: Workspace):
        super().__init__()
        self._of_baseline: dict[str, Any] = {}
        self.plan, self.layer, self.workspace = plan, layer, workspace
        self.experiment = plan.experiment
        self.store = ActivationStore(workspace.storage(plan.store))
        recipe = self.experiment.train
        _, self.heldout_shards = split_shards(self.store, recipe.heldout_shards, recipe.heldout_within)
        self.device = sae_device(self.experiment.run.device)
        """Where SAEs are evaluated."""
        self.rows = HeldoutRows(self.store, layer, self.heldout_shards, self.device)
        self.tasks = ProbeTasks(
            documents={
                dataset: Documents(ActivationStore(workspace.storage(artefact)), layer)
                for dataset, artefact in plan.probes.items()
            },
            k_values=self.experiment.evaluate.k_values,
            seed=self.experiment.probes.seed,
            draws=self.experiment.evaluate.probe_draws,
            device=self.device,
        )

    def kept_for(self, baseline: Artefact, compute: Callable[[], T]) -> T:
        """`compute()`, remembered until another baseline comes: SAEs of one seed are evaluated one after the other."""
        if baseline.path not in self._of_baseline:
            self._of_baseline.clear()
            self._of_baseline[baseline.path] = compute()
        return self._of_baseline[baseline.path]

    @cached_property
    def has(self) -> frozenset[Need]:
        """The needs of evaluations that this study meets."""
        model = self.experiment.model
        met = {Need.truth} if isinstance(model, KnownFeatures) else {Need.model}
        met |= {Need.saelens} if isinstance(model, SAELensModel) else set()
        return frozenset(met | {Need.probes} if self.tasks.documents else met)

    @cached_property
    def language_model(self) -> LanguageModel:
        """The whole language model. Raises BadInputError in a study with a synthetic one."""
        name, revision = study_model(self.plan, self.workspace)
        device = best_device(self.experiment.run.device)
        return LanguageModel(name, revision=revision, dtype=self.experiment.model.dtype, device=device)

    @cached_property
    def tokenizer(self) -> Any:
        """The language model's tokenizer. Raises BadInputError in a study with a synthetic model."""
        return load_tokenizer(*study_model(self.plan, self.workspace))

    @cached_property
    def truth(self) -> Truth:
        """The features of the synthetic model."""
        return open_synthetic_model(self.plan, self.workspace)


@dataclass(frozen=True, kw_only=True)
class ProbeScores:
    """What probes found of the model itself, as test accuracies by data set, and of an SAE."""

    model: Scores
    sae: Probing | DegenerateSAEError | None
    """The error where the SAE could not be probed; None where it was not asked for."""


class Bench(Shared):
    """One SAE, with all that an evaluation can read of it; `layer` has what the SAEs of the layer share."""

    def __init__(self, layer: LayerBench, planned: PlannedSAE, sae: SAE, scores: ProbeScores):
        super().__init__()
        self.layer, self.planned, self.sae, self.scores = layer, planned, sae, scores
        self.latents = Latents(sae, layer.rows)
        """Its latents on held-out rows."""

    @property
    def config(self) -> EvaluateConfig:
        """The experiment's section [evaluate]."""
        return self.layer.experiment.evaluate

    @cached_property
    def sae_config(self) -> dict[str, Any]:
        """The SAE's `cfg.json`."""
        return read_config(self.layer.workspace.verified(self.planned.artefact, CONFIG).parent)

    @cached_property
    def siblings(self) -> list[SAE]:
        """The SAEs of the arm's other seeds. Raises CorruptArtefactError for a damaged one."""
        return [open_sae(artefact, self.layer.workspace).to(self.sae.device) for artefact in self.planned.siblings]

    @property
    def control(self) -> PlannedSAE:
        """The SAE of the arm's control."""
        assert self.planned.control  # without one, evaluations that read it are not planned
        return self.planned.control

    @cached_property
    def baseline(self) -> SAE | Missing:
        """The SAE of the arm `baseline` with the same seed and layer."""
        artefact, workspace = self.planned.baseline, self.layer.workspace
        if artefact is None:
            from_here = isinstance(self.planned, TrainedSAE)
            return Missing("the study has no arm `baseline`" if from_here else "its latents are not those of `baseline`")
        try:
            if workspace.manifest(artefact) is None:
                return Missing("the arm `baseline` of this seed is not trained")
            return open_sae(artefact, workspace).to(self.sae.device)
        except CorruptArtefactError as error:
            return Missing(f"the arm `baseline` of this seed is damaged: {error}")
