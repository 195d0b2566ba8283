"""Studies that train every arm at several L0."""

from pathlib import Path

import pytest
from small_study import SMALL

from pipeline.errors import BadInputError
from pipeline.study.experiment import Experiment
from pipeline.study.plan import make_plan
from pipeline.study.planned import TrainedSAE

ARMS = 'arms = ["baseline", "full", "magnitude"]'
OWN = '\n[arms.sparse]\nquestion = "?"\nactivation = "topk"\nk = 5\n'


def loaded(small_toml: Path, study: str, own: str = OWN) -> Experiment:
    small_toml.write_text(SMALL.replace(ARMS, study) + own)
    return Experiment.load(str(small_toml))


def test_every_arm_is_planned_at_every_l0(small_toml: Path) -> None:
    plain = make_plan(loaded(small_toml, 'arms = ["baseline", "sparse"]'))
    plan = make_plan(loaded(small_toml, 'arms = ["baseline", "sparse"]\nsparsities = [3, 6, 12]'))
    assert [str(sae) for sae in plan.saes] == [
        f"{arm} L0 {level} seed 0 layer 2" for arm in ("baseline", "sparse") for level in (3, 6, 12)
    ]
    assert [sae.artefact.label for sae in plan.saes][:2] == ["baseline-l0-3-s0", "baseline-l0-6-s0"]
    recipes = [sae.recipe for sae in plan.saes if isinstance(sae, TrainedSAE)]
    assert [(recipe.k, recipe.l0_target) for recipe in recipes] == [
        (None, 3.0), (None, 6.0), (None, 12.0), (3, None), (6, None), (12, None)
    ]  # fmt: skip
    assert len({sae.artefact.key for sae in [*plan.saes, *plain.saes]}) == 8
    for baseline, sparse in zip(plan.saes[:3], plan.saes[3:], strict=True):  # pairs are the baseline's at the same L0
        assert sparse.baseline
        assert sparse.baseline.key == baseline.artefact.key


def test_an_sae_at_k_is_the_one_that_an_arm_with_that_k_trains(small_toml: Path) -> None:
    """Nothing is trained again when a study of one k becomes one of several."""
    (plain,) = make_plan(loaded(small_toml, 'arms = ["sparse"]')).saes
    levels = make_plan(loaded(small_toml, 'arms = ["sparse"]\nsparsities = [3, 5, 12]')).saes
    assert [sae.artefact.key == plain.artefact.key for sae in levels] == [False, True, False]


@pytest.mark.parametrize(
    ("study", "message"),
    [
        ("sparsities = [3, 6]", "study: sparsities 3, 6: a frontier takes at least 3 L0 that rise"),
        ("sparsities = [3, 6, 6]", "study: sparsities 3, 6, 6: a frontier takes at least 3 L0 that rise"),
        ("sparsities = [3, 0, 6]", "study.sparsities.1: input should be greater than 0, got 0"),
        (
            "sparsities = [3, 6.5, 9]",
            "study.sparsities: arm 'sparse' at 6.5: activation 'topk' keeps a whole number of latents; round it",
        ),
        (
            "sparsities = [3, 6, 97]",
            "study.sparsities: arm 'baseline' at 97: l0_target 97 is more than the 96 latents; lower",
        ),
        (
            'sparsities = [3, 6, 9]\narms = ["full", "l0-matched"]',
            "study.sparsities: arm 'l0-matched' at 3: match_l0 decides its L0; leave the arm out, or remove match_l0",
        ),
        (
            'sparsities = [3, 6, 9]\narms = ["free"]',
            "study.sparsities: arm 'free' at 3: l0_target 3 cannot be reached from l1 0; set l1 above 0",
        ),
    ],
)
def test_what_is_no_frontier_is_refused(small_toml: Path, study: str, message: str) -> None:
    arms = "" if "arms" in study else 'arms = ["baseline", "sparse"]\n'
    with pytest.raises(BadInputError) as caught:
        loaded(small_toml, arms + study, f'{OWN}\n[arms.free]\nquestion = "?"\nl1 = 0.0\n')
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
