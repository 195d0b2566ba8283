"""Small trainings and evaluations for a GPU, pretended or real, and what is compared of them."""

import json
from typing import Any, cast

import torch
from small_study import Study

from pipeline.artefacts.manifest import MANIFEST
from pipeline.artefacts.workspace import Workspace
from pipeline.study.arms import ARMS, Recipes
from pipeline.study.recipe import TrainConfig

D_IN, D_SAE, ROWS, STEPS = 24, 64, 48, 24


def recipe(arm: str, **changes: object) -> TrainConfig:
    """An arm of the method in small: resets at steps 8, 12, ..., thresholds anew on every third step."""
    sizes = {"d_sae": D_SAE, "steps": STEPS, "batch_size": ROWS, "lr_warmup": 4, "l1_warmup": 4}
    rates = {"l1": 0.2, "learning_rate": 1e-2, "contrast": {"pair_refresh": 3}, "resets": {"every": 4, "first": 8}}
    full = TrainConfig.model_validate(sizes | rates | changes, strict=True)
    return Recipes(full, {})[arm]


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(ROWS, D_IN, generator=generator) / D_IN**0.5 for _ in range(STEPS)]


TRAINED = [arm for arm in ARMS if arm != "l0-matched"]


def numbers(value: Any, path: str = "") -> dict[str, float]:
    """All numbers of a file, by where they stand."""
    if isinstance(value, dict | list):
        inner = cast("Any", value.items() if isinstance(value, dict) else enumerate(cast("list[Any]", value)))
        return {place: found for key, item in inner for place, found in numbers(item, f"{path}.{key}").items()}
    return {path: float(value)} if isinstance(value, int | float) else {}


def files(study: Study, workspace: Workspace, arms: list[str]) -> dict[str, dict[str, float]]:
    """The numbers of every file of every evaluation, without times."""
    found: dict[str, dict[str, float]] = {}
    for sae in study.plan.saes:
        made = [workspace.folder(artefact) for artefact in (sae.evaluation, *sae.apart.values())]
        for path in [path for folder in made for path in folder.glob("*.json")] if sae.arm in arms else ():
            if path.name != MANIFEST:
                values = numbers(json.loads(path.read_text()))
                found[f"{sae.arm} {path.name}"] = {place: value for place, value in values.items() if "millis" not in place}
    return found
