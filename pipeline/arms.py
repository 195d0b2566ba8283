"""The named ablation arms: each one is the recipe `full` with a few fields changed, and one question."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from pipeline.errors import BadInputError
from pipeline.experiment import TrainConfig, explain


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of the ablation table."""

    run: int
    """Number of the run in the method's original plan."""
    question: str
    """What its difference to `full` (or, for `full`, to `no-contrast`) tells."""
    diff: Mapping[str, Any]
    """Fields of TrainConfig that differ from `full`; `contrast.topk` reaches into a section, None removes it."""


ARMS: dict[str, Arm] = {
    "baseline": Arm(
        run=0,
        question="What does a vanilla SAE reach: unit-norm decoder, no contrast, no resets?",
        diff={"decoder_norm": "unit", "contrast": None, "resets": None},
    ),
    "full": Arm(
        run=1,
        question="The whole method: free norms, directional, top-K of row or column, weighted, resets after step 1,000.",
        diff={},
    ),
    "magnitude": Arm(
        run=2,
        question="Does it matter that pairs are selected by direction rather than by dot product?",
        diff={"contrast.by": "magnitude"},
    ),
    "no-contrast": Arm(
        run=3,
        question="Does the contrastive term do anything? (the matched control)",
        diff={"contrast": None},
    ),
    "unweighted": Arm(
        run=4,
        question="Does weighting pairs by co-activation matter?",
        diff={"contrast.weighted": False},
    ),
    "coef-0.05": Arm(
        run=5,
        question="How sensitive is it to the coefficient (half)?",
        diff={"contrast.coefficient": 0.05},
    ),
    "coef-0.2": Arm(
        run=6,
        question="How sensitive is it to the coefficient (double)?",
        diff={"contrast.coefficient": 0.2},
    ),
    "topk-0.05": Arm(
        run=7,
        question="How sensitive is it to the number of pairs (half)?",
        diff={"contrast.topk": 0.05},
    ),
    "topk-0.2": Arm(
        run=8,
        question="How sensitive is it to the number of pairs (double)?",
        diff={"contrast.topk": 0.2},
    ),
    "warmup-2000": Arm(
        run=9,
        question="Does a later first reset of dead latents help?",
        diff={"resets.first": 2000},
    ),
    "warmup-500": Arm(
        run=10,
        question="Does an earlier first reset of dead latents help?",
        diff={"resets.first": 500},
    ),
}


def recipe(arm: str, full: TrainConfig) -> TrainConfig:
    """The TrainConfig of `arm`, given the experiment's own recipe.

    Raises BadInputError for an arm that does not exist or whose diff makes an invalid recipe.
    """
    if arm not in ARMS:
        raise BadInputError(f"unknown arm {arm!r}; the arms are {', '.join(ARMS)}")
    fields = full.model_dump()
    for path, value in ARMS[arm].diff.items():
        section, _, field = path.rpartition(".")
        if section and fields[section] is None:
            raise BadInputError(f"arm {arm!r} changes {path}, but the experiment has no [train.{section}]")
        (fields[section] if section else fields)[field] = value
    try:
        return TrainConfig.model_validate(fields)
    except ValidationError as error:
        raise BadInputError(f"arm {arm!r}: {explain(error)}") from None
