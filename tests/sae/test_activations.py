"""Activations: one definition each, used everywhere, and closed forms that are the definition's gradient."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_study import SMALL

from pipeline.errors import BadInputError, CorruptArtefactError
from pipeline.sae.activation import Activation, ClosedForm
from pipeline.sae.activations import ACTIVATIONS
from pipeline.sae.formats import CONFIG, read_sae, write_sae
from pipeline.sae.sae import SAE
from pipeline.study.experiment import Experiment
from pipeline.study.recipe import TrainConfig

PIPELINE = Path(__file__).parents[2] / "pipeline"


def recipe(name: str) -> TrainConfig:
    return TrainConfig(d_sae=9, steps=9, activation=name, k=3 if ACTIVATIONS[name].fixes_l0 else None, resets=None)


TRAINING = {name: found.for_training(recipe(name)) for name, found in ACTIVATIONS.items()}
CLOSED_FORMS = {name: found for name, found in TRAINING.items() if isinstance(found, ClosedForm)}
NORM_F = torch.linspace(0.5, 2, 9, dtype=torch.float64)


def finished(name: str) -> Activation:
    """As after one step on six random rows."""
    activation = ACTIVATIONS[name].for_training(recipe(name)).with_thresholds(torch.linspace(0, 0.5, 9).double())
    pre_BF = torch.randn(6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    activation.observe(activation.in_training(pre_BF, NORM_F), NORM_F)
    return activation.finished(NORM_F)


def test_nobody_writes_an_activation_a_second_time() -> None:
    used = re.compile(r"\brelu_?\(|threshold_backward|\.relu\b|clamp(_min)?_?\(0")
    found = [path.relative_to(PIPELINE).as_posix() for path in PIPELINE.rglob("*.py") if used.search(path.read_text())]
    assert sorted(found) == [
        "sae/activation.py",
        "sae/activations.py",
        "sae/gated.py",
        "sae/jumprelu.py",
        "sae/topk.py",
        "train/nearest.py",
    ]  # the last: cosines


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 10))
def test_norms_can_be_folded_into_the_encoder(name: str, seed: int, scale: float) -> None:
    pre_BF = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    activation, factor_F = finished(name), torch.tensor(scale)
    torch.testing.assert_close(activation.scaled(factor_F)(pre_BF * scale), activation(pre_BF) * scale)


@pytest.mark.parametrize("name", CLOSED_FORMS)
@given(seed=st.integers(0, 2**31))
def test_the_closed_form_is_the_gradient_of_the_definition(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pre_BF, gradient_BF = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    leaf_BF = pre_BF.clone().requires_grad_()
    f_BF = CLOSED_FORMS[name].in_training(leaf_BF, NORM_F)
    (expected_BF,) = torch.autograd.grad(f_BF, leaf_BF, gradient_BF)
    assert torch.equal(CLOSED_FORMS[name].in_training_(pre_BF, NORM_F), f_BF.detach())
    CLOSED_FORMS[name].backward_(gradient_BF, f_BF.detach())
    assert torch.equal(gradient_BF, expected_BF)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_sae_is_read_with_the_activation_it_was_written_with(name: str, tmp_path: Path) -> None:
    written = SAE(
        W_enc_DF=torch.eye(9),
        b_enc_F=torch.zeros(9),
        W_dec_FD=torch.eye(9),
        b_dec_D=torch.zeros(9),
        activation=finished(name).scaled(NORM_F.float()),
    )
    write_sae(written, tmp_path, {})
    x_BD = torch.randn(5, 9)
    assert torch.equal(read_sae(tmp_path).encode(x_BD), written.encode(x_BD))
    config = (tmp_path / CONFIG).read_text()
    (tmp_path / CONFIG).write_text(config.replace(ACTIVATIONS[name].architecture, "other"))
    with pytest.raises(
        CorruptArtefactError, match=r"cfg\.json: architecture 'other' is not one of standard, topk, jumprelu"
    ):
        read_sae(tmp_path)


def test_an_unknown_activation_is_one_line(small_toml: Path) -> None:
    small_toml.write_text(SMALL.replace("[train]\n", '[train]\nactivation = "rellu"\n'))
    with pytest.raises(
        BadInputError, match=r"train\.activation: should be one of 'relu', 'topk', 'batchtopk', 'jumprelu', got 'rellu'$"
    ):
        Experiment.load(str(small_toml))
