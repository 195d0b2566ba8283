"""Describes one SAE of a study: any SAE, and one that is trained here."""

from dataclasses import dataclass, field

from pipeline.artefacts.manifest import Artefact
from pipeline.study.recipe import TrainConfig


@dataclass(frozen=True, kw_only=True)
class PlannedSAE:
    """An SAE that is evaluated and shown, wherever it comes from. Its artefact holds it in SAELens' format."""

    origin: str
    """Name of its source in `pipeline.study.origins.ORIGINS`."""
    arm: str
    """The arm that trains it; for an SAE that others trained, the name that the study gives it."""
    seed: int
    """Seed of its initial weights; 0 for an SAE that others trained."""
    layer: int
    sparsity: float | None = None
    """The L0 that it is trained at, in a study with frontiers."""
    artefact: Artefact
    evaluation: Artefact
    apart: dict[str, Artefact] = field(default_factory=dict[str, Artefact])
    """The evaluations that have an artefact of their own, by name."""
    siblings: tuple[Artefact, ...] = ()
    """The SAEs of the same arm and layer, and L0, with the study's other seeds."""
    baseline: Artefact | None = None
    """The SAE whose pairs of latents this one is measured on: the arm `baseline` with the same seed, layer and L0. None in a
    study without that arm, and for an SAE that others trained, because its latents do not correspond to the baseline's."""

    control: "PlannedSAE | None" = None
    """The SAE of the arm's control (`Recipes.control`) with the same seed, layer and L0, trained from the same weights."""

    def __str__(self) -> str:
        level = "" if self.sparsity is None else f" L0 {self.sparsity:g}"
        return f"{self.arm}{level} seed {self.seed} layer {self.layer}"


@dataclass(frozen=True, kw_only=True)
class TrainedSAE(PlannedSAE):
    """One cell of the study, arm x seed x layer x sparsity, trained here by a recipe."""

    recipe: TrainConfig
    matched_to: "TrainedSAE | None" = None
    """The SAE whose L0 this one is matched to, of the same seed and layer. It need not be in the plan."""
