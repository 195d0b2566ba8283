"""Activations: one definition each, used everywhere, and closed forms that are the definition's gradient."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_study import SMALL

from pipeline.errors import BadInputError, CorruptArtefactError
from pipeline.sae.activations import ACTIVATIONS, ClosedForm
from pipeline.sae.formats import CONFIG, read_sae, write_sae
from pipeline.sae.sae import SAE
from pipeline.study.experiment import Experiment

PIPELINE = Path(__file__).parents[2] / "pipeline"
CLOSED_FORMS = {name: found for name, found in ACTIVATIONS.items() if isinstance(found, ClosedForm)}


def test_nobody_writes_an_activation_a_second_time() -> None:
    used = re.compile(r"\brelu_?\(|threshold_backward|\.relu\b|clamp(_min)?_?\(0")
    found = [path.relative_to(PIPELINE).as_posix() for path in PIPELINE.rglob("*.py") if used.search(path.read_text())]
    assert found == ["sae/activations.py"]


@pytest.mark.parametrize("name", ACTIVATIONS)
@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 10))
def test_norms_can_be_folded_into_the_encoder(name: str, seed: int, scale: float) -> None:
    pre_BF = torch.randn(6, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    torch.testing.assert_close(ACTIVATIONS[name](pre_BF * scale), ACTIVATIONS[name](pre_BF) * scale)


@pytest.mark.parametrize("name", CLOSED_FORMS)
@given(seed=st.integers(0, 2**31))
def test_the_closed_form_is_the_gradient_of_the_definition(name: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    pre_BF, gradient_BF = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    leaf_BF = pre_BF.clone().requires_grad_()
    f_BF = CLOSED_FORMS[name].in_training(leaf_BF)
    (expected_BF,) = torch.autograd.grad(f_BF, leaf_BF, gradient_BF)
    assert torch.equal(CLOSED_FORMS[name].in_training_(pre_BF), f_BF.detach())
    CLOSED_FORMS[name].backward_(gradient_BF, f_BF.detach())
    assert torch.equal(gradient_BF, expected_BF)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_sae_is_read_with_the_activation_it_was_written_with(name: str, tmp_path: Path) -> None:
    written = SAE(
        W_enc_DF=torch.eye(3),
        b_enc_F=torch.zeros(3),
        W_dec_FD=torch.eye(3),
        b_dec_D=torch.zeros(3),
        activation=ACTIVATIONS[name],
    )
    write_sae(written, tmp_path, {})
    assert read_sae(tmp_path).activation is ACTIVATIONS[name]
    config = (tmp_path / CONFIG).read_text()
    (tmp_path / CONFIG).write_text(config.replace(ACTIVATIONS[name].architecture, "other"))
    with pytest.raises(CorruptArtefactError, match=r"cfg\.json: architecture 'other' is not one of standard"):
        read_sae(tmp_path)


def test_an_unknown_activation_is_one_line(small_toml: Path) -> None:
    small_toml.write_text(SMALL.replace("[train]\n", '[train]\nactivation = "rellu"\n'))
    with pytest.raises(BadInputError, match=r"train\.activation: should be one of 'relu', got 'rellu'$"):
        Experiment.load(str(small_toml))
