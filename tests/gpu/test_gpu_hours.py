"""The prediction of a study's time, held against the kernels of training steps."""

from typing import Any

import gpu_model
import pytest

from pipeline.study.arms import Recipes
from pipeline.study.experiment import Experiment
from pipeline.study.gpu_hours import REACHED, predict, step_seconds
from pipeline.study.plan import make_plan
from pipeline.study.recipe import TrainConfig


@pytest.mark.parametrize("arm", ["baseline", "no-contrast", "full", "unweighted"])
@pytest.mark.parametrize(("d_in", "d_sae", "rows"), [(2304, 2304, 2048), (2304, 16384, 2048), (768, 6144, 4096)])
def test_a_step_takes_what_its_kernels_take(arm: str, d_in: int, d_sae: int, rows: int) -> None:
    fields: dict[str, Any] = {"d_sae": d_sae, "steps": 10_000, "batch_size": rows, "precision": "bfloat16"}
    # No thresholds: the step that the kernels are counted of has none due.
    contrast = {"precision": "bfloat16", "pair_refresh": 1_000_000}
    recipe = Recipes(TrainConfig.model_validate(fields | {"contrast": contrast}, strict=True))[arm]
    gpu = gpu_model.step(arm, "bfloat16", d_in, d_sae, rows)
    assert step_seconds(recipe, d_in) == pytest.approx(gpu.seconds / REACHED, rel=0.2, abs=1e-4)


def test_a_study_grows_with_what_is_asked_of_it() -> None:
    experiment = Experiment.load("gemma-2-2b")
    few, all_of_it = (predict(make_plan(experiment, layers=layers)) for layers in ([5], None))
    assert all_of_it.train == pytest.approx(3 * few.train)
    assert all_of_it.evaluate > few.evaluate
    assert predict(make_plan(Experiment.load("synthetic"))).hours < 1
