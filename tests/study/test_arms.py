"""The arms of the demonstration study differ in their first step only where their definition says."""

from dataclasses import dataclass

import torch

from pipeline.sae.activations import RELU
from pipeline.study.arms import ARMS, Recipes
from pipeline.study.experiment import Experiment
from pipeline.study.recipe import ArmConfig
from pipeline.train.gradients import closed_form
from pipeline.train.losses import Objective, differentiated
from pipeline.train.penalty import penalty_term
from pipeline.train.step import Trainer
from pipeline.train.weights import Weights

D_IN, ROWS = 48, 64


@dataclass
class FirstStep:
    """An arm's weights before its first step and the gradient of the loss there, sparsity at its full weight."""

    weights: Weights
    gradient: Weights


def first_step(arm: str) -> FirstStep:
    config = Experiment.load("demo").recipes[arm]
    trainer = Trainer(config=config, d_in=D_IN, seed=1)
    x_BD = torch.nn.functional.normalize(torch.randn(ROWS, D_IN, generator=torch.Generator().manual_seed(3)), dim=1)
    section = config.only_penalty
    penalty = penalty_term(section, trainer.weights) if section else None
    if penalty:
        penalty.prepare(0)
    weight = section.coefficient if section else 0.0
    loss = Objective(activation=RELU, l1=config.l1, penalty=penalty, weight=weight)
    by_autograd = penalty is not None and penalty.rescales_encoder
    done = (differentiated if by_autograd else closed_form)(trainer.weights, x_BD, loss)
    gradient = Weights(**{name: tensor.clone() for name, tensor in done.gradient.named()})
    return FirstStep(trainer.weights, gradient)


def test_all_arms_of_a_seed_begin_with_the_same_weights_and_differ_in_one_thing() -> None:
    steps = {arm: first_step(arm) for arm in ARMS if arm != "random"}  # its encoder is its decoder's transpose
    for step in steps.values():
        for mine, its in zip(step.weights.tensors(), steps["full"].weights.tensors(), strict=True):
            assert torch.equal(mine, its)

    def extra(arm: str) -> list[torch.Tensor]:
        """What the arm's penalty adds to the gradient of the arm without one."""
        plain = steps["no-contrast"].gradient.tensors()
        return [mine - its for mine, its in zip(steps[arm].gradient.tensors(), plain, strict=True)]

    def close(one: list[torch.Tensor], other: list[torch.Tensor], factor: float = 1.0) -> bool:
        return all(
            torch.allclose(a, factor * b, rtol=1e-3, atol=1e-6 * max(1e-3, float(b.abs().max())) + 2e-7)
            for a, b in zip(one, other, strict=True)
        )

    full = extra("full")
    assert not close(full, extra("no-contrast"))
    assert close(extra("baseline"), extra("no-contrast"))  # it differs in the decoder's norm and in resets, later
    assert close(extra("warmup-2000"), full)
    assert close(extra("warmup-500"), full)
    assert close(extra("unit-norm"), full)
    assert close(extra("coef-0.05"), full, 0.5)
    assert close(extra("coef-0.2"), full, 2.0)
    mean = [(union + mutual) / 2 for union, mutual in zip(full, extra("mutual"), strict=True)]
    assert close(extra("row"), mean)
    for arm in ("unweighted", "orthogonal", "topk-0.05", "topk-0.2", "mutual", "literal", "magnitude"):
        assert not close(extra(arm), full), arm
    # At norm 1 dot products are cosines: only the decoder's norms feel a difference.
    magnitude = dict(zip(("W_enc", "b_enc", "W_dec", "b_dec"), extra("magnitude"), strict=True))
    assert close([magnitude["W_enc"], magnitude["b_enc"], magnitude["b_dec"]], [full[0], full[1], full[3]])
    radial_FD = magnitude["W_dec"] - full[2]
    W_dec_FD = steps["full"].weights.W_dec_FD
    along_FD = (radial_FD * W_dec_FD).sum(dim=1, keepdim=True) * W_dec_FD
    assert torch.allclose(radial_FD, along_FD, atol=1e-6)
    assert float(radial_FD.abs().max()) > 1e-5


def test_the_control_of_an_arm_differs_by_the_penalty_or_the_order_of_batches_alone() -> None:
    demo = Experiment.load("demo")
    controls = {arm: demo.recipes.control(arm, demo.study.arms) for arm in demo.study.arms}
    penalised = ("full", "magnitude", "unweighted", "coef-0.05", "coef-0.2", "topk-0.05", "topk-0.2")
    others = dict.fromkeys(("baseline", "no-contrast", "warmup-2000", "warmup-500", "no-contrast-l0"))
    assert controls == {**dict.fromkeys(penalised, "no-contrast"), **others, "other-order": "baseline"}
    assert demo.recipes.control("full", ["full", "baseline"]) is None
    rivals = Experiment.load("rivals")
    controls = {arm: rivals.recipes.control(arm, rivals.study.arms) for arm in rivals.study.arms}
    plain = dict.fromkeys(("full", "ortsae", "c2r"), "baseline")
    plain |= dict.fromkeys(("bt-full", "bt-ortsae", "bt-c2r"), "bt-plain")
    assert {arm: control for arm, control in controls.items() if control} == plain


def test_without_such_an_arm_the_control_is_the_one_without_a_penalty_that_it_is_compared_with() -> None:
    demo = Experiment.load("demo")
    own = {
        "at-its-l0": {"from": "full", "question": "?", "against": "no-contrast", "match_l0": "no-contrast"},
        "beside-full": {"from": "full", "question": "?", "match_l0": "no-contrast"},
    }
    recipes = Recipes(demo.train, {name: ArmConfig.model_validate(arm) for name, arm in own.items()})
    study = ["full", "no-contrast", *own]
    assert [recipes.control(arm, study) for arm in study] == ["no-contrast", None, "no-contrast", None]
