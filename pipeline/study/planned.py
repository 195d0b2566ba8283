"""One SAE of a study: what every SAE has, and what one has besides that is trained here."""

from dataclasses import dataclass

from pipeline.artefacts.manifest import Artefact
from pipeline.study.recipe import TrainConfig


@dataclass(frozen=True, kw_only=True)
class PlannedSAE:
    """An SAE that is evaluated and shown, wherever it comes from. Its artefact holds it in SAELens' format."""

    arm: str
    """The arm that trains it; for one that others trained, the name that the study gives it."""
    seed: int
    layer: int
    artefact: Artefact
    evaluation: Artefact
    baseline: Artefact | None
    """The SAE of the arm `baseline` with the same seed and layer, on whose pairs it is measured; None in a study without."""

    def __str__(self) -> str:
        return f"{self.arm} seed {self.seed} layer {self.layer}"


@dataclass(frozen=True, kw_only=True)
class TrainedSAE(PlannedSAE):
    """One cell of the study: an arm, a seed and a layer, trained here by a recipe."""

    recipe: TrainConfig
    matched_to: "TrainedSAE | None" = None
    """The SAE of the same seed and layer whose L0 this one is matched to, whether or not it is part of the plan."""
