"""The recipes of an experiment's arms are resolved once, and belong to the experiment whose sections they come from."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from small_study import SMALL

from pipeline.study import arms
from pipeline.study.arms import Recipes
from pipeline.study.experiment import Experiment
from pipeline.study.plan import make_plan
from pipeline.study.recipe import ArmConfig, TrainConfig

OWN = """
[arms.strong]
question = "What does five times the weight do?"
contrast.coefficient = 0.5

[arms.stronger]
from = "strong"
question = "And ten times?"
contrast.coefficient = 1.0

[arms.as-sparse]
question = "At equal sparsity?"
contrast = false
match_l0 = "stronger"
"""


@pytest.fixture
def own_arms(small_toml: Path) -> str:
    text = small_toml.read_text().replace('"magnitude"]', '"magnitude", "stronger", "as-sparse"]')
    small_toml.write_text(text.replace("seeds = [0]", "seeds = [0, 1]") + OWN)
    return str(small_toml)


def test_every_recipe_is_resolved_once(own_arms: str, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved: Counter[str] = Counter()

    class Counted(TrainConfig):
        @classmethod
        def model_validate(cls, obj: Any, **options: Any) -> TrainConfig:
            recipe = TrainConfig.model_validate(obj, **options)
            resolved[recipe.model_dump_json()] += 1
            return recipe

    monkeypatch.setattr(arms, "TrainConfig", Counted)
    experiment = Experiment.load(own_arms)
    plan = make_plan(experiment)
    make_plan(experiment, arms=["full"], seeds=[1])
    assert len(plan.saes) == 2 * len(experiment.study.arms)
    # baseline, magnitude, strong, stronger, as-sparse; `full` is the experiment's own section.
    assert len(resolved) == 5
    assert set(resolved.values()) == {1}


def test_a_copy_with_another_recipe_has_arms_of_its_own(own_arms: str) -> None:
    experiment = Experiment.load(own_arms)
    assert experiment.recipes["baseline"].l1 == 0.04
    copy = experiment.model_copy(update={"train": experiment.train.model_copy(update={"l1": 0.5})})
    assert copy.recipes["baseline"].l1 == copy.recipes["full"].l1 == 0.5
    assert experiment.recipes["baseline"].l1 == 0.04


def test_a_section_of_the_recipe_itself_is_removed_by_false(small_toml: Path) -> None:
    small_toml.write_text(SMALL.replace("steps = 120", "steps = 120\ncontrast = false").replace('"magnitude"', '"mine"', 1))
    small_toml.write_text(small_toml.read_text() + '\n[arms.mine]\nquestion = "?"\nl1 = 0.1\n')
    recipes = Experiment.load(str(small_toml)).recipes
    assert recipes["full"] == recipes["no-contrast"]
    assert recipes["mine"].contrast is None
    assert recipes["full"].resets is not None


def test_a_backbone_is_named_by_all_that_makes_another_sae_of_it() -> None:
    full = TrainConfig(d_sae=8, steps=9, activation="topk", k=2, resets=None, lr_warmup=1, l1_warmup=1)
    own = {
        "nested": ArmConfig.model_validate({"question": "?", "prefixes": [4, 8]}),
        "still": ArmConfig.model_validate({"question": "?", "frozen": "decoder", "contrast": False}),
    }
    recipes = Recipes(full, own)
    assert [(recipes[arm].backbone, recipes[arm].penalty_kind) for arm in ("full", "nested", "still", "random")] == [
        ("topk", "contrast"), ("topk, Matryoshka", "contrast"), ("topk, random decoder", "none"),
        ("topk, random directions", "none"),
    ]  # fmt: skip
