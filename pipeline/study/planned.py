"""One SAE of a study: what every SAE has, and what an SAE has besides that is trained here."""

from dataclasses import dataclass

from pipeline.artefacts.manifest import Artefact
from pipeline.study.recipe import TrainConfig


@dataclass(frozen=True, kw_only=True)
class PlannedSAE:
    """An SAE that is evaluated and shown, wherever it comes from. Its artefact holds it in SAELens' format."""

    origin: str
    """Where it comes from: a name in `study.origins.ORIGINS`."""
    arm: str
    """The arm that trains it; for an SAE that others trained, the name that the study gives it."""
    seed: int
    """Seed of its initial weights; 0 for an SAE that others trained."""
    layer: int
    artefact: Artefact
    evaluation: Artefact
    baseline: Artefact | None = None
    """The SAE on whose pairs of latents this one is measured: the arm `baseline` with the same seed and layer. None in a
    study without that arm, and for an SAE that others trained, whose latents do not correspond to the baseline's."""

    def __str__(self) -> str:
        return f"{self.arm} seed {self.seed} layer {self.layer}"


@dataclass(frozen=True, kw_only=True)
class TrainedSAE(PlannedSAE):
    """One cell of the study, arm x seed x layer, trained here by a recipe."""

    recipe: TrainConfig
    matched_to: "TrainedSAE | None" = None
    """The SAE of the same seed and layer whose L0 this one is matched to; the plan need not hold it."""
