"""A Trainer over several steps: against the definition, against `dictionary_learning`, and after an interruption."""

import itertools
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from pipeline.sae.activations import RELU
from pipeline.study.penalties import Contrast
from pipeline.study.recipe import Resets, TrainConfig
from pipeline.train import losses, pair_selection
from pipeline.train.penalty import penalty_term
from pipeline.train.step import Trainer

D_IN, D_SAE, ROWS = 12, 20, 32


def config(**changes: Any) -> TrainConfig:
    values: dict[str, Any] = {
        "d_sae": D_SAE,
        "steps": 80,
        "batch_size": ROWS,
        "learning_rate": 1e-2,
        "lr_warmup": 5,
        "l1_warmup": 5,
        "l1": 0.02,
        "resets": None,
    }
    return TrainConfig.model_validate(values | changes)


def batches() -> Iterator[torch.Tensor]:
    """Rows made of few directions."""
    generator = torch.Generator().manual_seed(0)
    directions_GD = torch.nn.functional.normalize(torch.randn(8, D_IN, generator=generator), dim=1)
    while True:
        weights_BG = torch.rand(ROWS, 8, generator=generator) * (torch.rand(ROWS, 8, generator=generator) < 0.3)
        yield weights_BG @ directions_GD


def held_out() -> torch.Tensor:
    """Rows that 80 steps do not reach."""
    return torch.cat(list(itertools.islice(batches(), 80, 88)))


def trained(recipe: TrainConfig, steps: int) -> Trainer:
    trainer, stream = Trainer(config=recipe, d_in=D_IN, seed=0), batches()
    for _ in range(steps):
        trainer.step(next(stream))
    return trainer


VARIANTS = {
    "baseline": config(decoder_norm="unit", contrast=None),
    "full": config(),
    "magnitude": config(contrast=Contrast(by="magnitude")),
    "unweighted": config(contrast=Contrast(weighted=False)),
    "row": config(contrast=Contrast(select="row")),
    "mutual": config(contrast=Contrast(select="mutual")),
    "unit": config(decoder_norm="unit"),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_thirty_steps_are_those_of_autograd_and_torchs_adam(name: str) -> None:
    recipe = VARIANTS[name]
    ours, reference = trained(recipe, 30), Trainer(config=recipe, d_in=D_IN, seed=0).weights
    optimizer = torch.optim.Adam(reference.tensors())
    stream = batches()
    for step in range(30):
        penalty = penalty_term(recipe.contrast, reference) if recipe.contrast else None
        loss = losses.Objective(activation=RELU, l1=0.02 * min(1, step / 5), penalty=penalty, weight=0.1)
        measured = losses.differentiated(reference, next(stream), loss)
        gradient_FD, W_dec_FD = measured.gradient.W_dec_FD, reference.W_dec_FD
        if recipe.decoder_norm == "unit":
            unit_FD = torch.nn.functional.normalize(W_dec_FD)
            gradient_FD -= (gradient_FD * unit_FD).sum(dim=1, keepdim=True) * unit_FD
        for parameter, gradient in zip(reference.tensors(), measured.gradient.tensors(), strict=True):
            parameter.grad = gradient
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, step / 5)
        optimizer.step()
        if recipe.decoder_norm == "unit":
            W_dec_FD /= W_dec_FD.norm(dim=1, keepdim=True)
    for (tensor, expected), actual in zip(reference.named(), ours.weights.tensors(), strict=True):
        torch.testing.assert_close(
            actual, expected, atol=2e-4, rtol=1e-3, msg=lambda text, tensor=tensor: f"{tensor}: {text}"
        )


@pytest.fixture
def standard_trainer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The peer's class. Its package imports nnsight, which only its activation buffers use, and warns on the way."""
    monkeypatch.setitem(sys.modules, "nnsight", types.SimpleNamespace(LanguageModel=object))
    pytest.importorskip("dictionary_learning", reason="dictionary-learning is not installed (extra `bench`)")
    from dictionary_learning.trainers.standard import StandardTrainer

    return StandardTrainer


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_the_baseline_is_dictionary_learnings_standard_trainer(standard_trainer: Any, decay: float) -> None:
    """Fifty of its steps, schedules included, from the same weights on the same batches."""
    recipe = config(decoder_norm="unit", contrast=None, learning_rate=1e-3, l1=0.04, l1_warmup=10, lr_decay=decay)
    recipe = recipe.model_copy(update={"steps": 60})
    ours = Trainer(config=recipe, d_in=D_IN, seed=0)
    theirs = standard_trainer(
        steps=60,
        activation_dim=D_IN,
        dict_size=D_SAE,
        layer=0,
        lm_name="",
        lr=1e-3,
        l1_penalty=0.04,
        warmup_steps=5,
        sparsity_warmup_steps=10,
        decay_start=48 if decay else None,
        device="cpu",
    )
    with torch.no_grad():
        theirs.ae.encoder.weight.copy_(ours.weights.W_enc_DF.T)
        theirs.ae.encoder.bias.copy_(ours.weights.b_enc_F)
        theirs.ae.decoder.weight.copy_(ours.weights.W_dec_FD.T)
        theirs.ae.bias.copy_(ours.weights.b_dec_D)
    before = ours.weights.W_dec_FD.clone()
    stream = batches()
    for step in range(50):
        x_BD = next(stream)
        ours.step(x_BD)
        theirs.update(step, x_BD)
    assert float((ours.weights.W_dec_FD - before).abs().max()) > 1e-2
    for actual, expected in (
        (ours.weights.W_enc_DF, theirs.ae.encoder.weight.T),
        (ours.weights.b_enc_F, theirs.ae.encoder.bias),
        (ours.weights.W_dec_FD, theirs.ae.decoder.weight.T),
        (ours.weights.b_dec_D, theirs.ae.bias),
    ):
        torch.testing.assert_close(actual, expected.detach(), atol=1e-5, rtol=0)


INTERRUPTED = {
    "everything": config(
        resets=Resets(every=10, first=20),
        contrast=Contrast(every=3, pair_refresh=7, precision="bfloat16"),
        precision="bfloat16",
    ),
    "baseline": config(decoder_norm="unit", contrast=None),
    "literal": config(contrast=Contrast(literal=True)),
}


@pytest.mark.parametrize("name", INTERRUPTED)
@pytest.mark.parametrize("stop", [0, 31, 40])
def test_a_state_saved_in_the_middle_goes_on_bit_for_bit(name: str, stop: int, tmp_path: Path) -> None:
    recipe, stream = INTERRUPTED[name], batches()
    # Silent latents, so that the resets before and after the interruption have something to do.
    whole = Trainer(config=recipe, d_in=D_IN, seed=3)
    whole.weights.b_enc_F[:6] = -100
    for _ in range(stop):
        whole.step(next(stream))
    save_file(whole.state(), tmp_path / "state.safetensors")
    resumed = Trainer(config=recipe, d_in=D_IN, seed=99)
    resumed.load_state(load_file(tmp_path / "state.safetensors"))
    for _ in range(30):
        x_BD = next(stream)
        expected, actual = whole.step(x_BD), resumed.step(x_BD)
        assert vars(expected) == vars(actual)
    if recipe.resets:
        assert whole.resets > 0
    assert whole.state().keys() == resumed.state().keys()
    for key, tensor in whole.state().items():
        assert torch.equal(tensor, resumed.state()[key]), key


def test_a_contrast_of_every_third_step_is_three_times_as_strong_on_those_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[float] = []
    monkeypatch.setattr(
        "pipeline.train.step.closed_form",
        lambda weights, x_BD, loss, **precision: used.append(loss.weight) or real(weights, x_BD, loss, **precision),
    )
    from pipeline.train.gradients import closed_form as real

    trainer, stream = Trainer(config=config(contrast=Contrast(every=3)), d_in=D_IN, seed=0), batches()
    contrasts = [float(trainer.step(next(stream)).terms["contrast"]) for _ in range(7)]
    assert used == pytest.approx([0.3, 0, 0, 0.3, 0, 0, 0.3])
    # Between them the log repeats what was last computed.
    assert contrasts[0] == contrasts[1] == contrasts[2] != contrasts[3] == contrasts[5] != contrasts[6]


def test_thresholds_are_refreshed_when_due_and_after_a_reset(monkeypatch: pytest.MonkeyPatch) -> None:
    refreshed: list[int] = []
    real = pair_selection.thresholds
    recipe = config(contrast=Contrast(every=2, pair_refresh=5), resets=Resets(every=10, first=20))
    trainer, stream = Trainer(config=recipe, d_in=D_IN, seed=0), batches()
    monkeypatch.setattr(
        "pipeline.train.pair_selection.thresholds", lambda *arguments: refreshed.append(trainer.done) or real(*arguments)
    )
    trainer.weights.b_enc_F[:3] = -100
    reset = [trainer.step(next(stream)).reset_now for _ in range(32)]
    assert reset[20 - 1] >= 3
    assert trainer.resets == sum(reset)
    # On even steps only; step 20 comes 2 after the last refresh, and with new latents.
    assert refreshed[:5] == [0, 6, 12, 18, 20]


def test_bfloat16_products_train_as_float32_ones_do() -> None:
    exact, rounded = trained(config(), 80), trained(config(precision="bfloat16"), 80)
    assert rounded.weights.W_dec_FD.dtype == torch.float32
    assert not torch.equal(exact.weights.W_dec_FD, rounded.weights.W_dec_FD)
    one, other = (float(trainer.step(held_out()).fvu) for trainer in (exact, rounded))
    assert one < 0.5
    assert other == pytest.approx(one, rel=0.05)


def test_the_literal_formula_is_its_quadruple_sum() -> None:
    generator = torch.Generator().manual_seed(0)
    f_BF = torch.rand(3, 5, generator=generator)
    W_dec_FD = torch.randn(5, 4, generator=generator)
    direction_FD = W_dec_FD / W_dec_FD.norm(dim=1, keepdim=True)
    cosine_FF = direction_FD @ direction_FD.T
    # K = 0.4 of 5 latents is 2 a row: the latent itself and its nearest.
    nearest = cosine_FF.clone().fill_diagonal_(-2).argmax(dim=1).tolist()
    expected = sum(
        float(cosine_FF[i, j] * f_BF[b, i] * f_BF[b, j])
        for b in range(3)
        for i in range(5)
        for j in range(5)
        if i == j or nearest[i] == j or nearest[j] == i
    )
    weights = Trainer(config=config(), d_in=4, seed=0).weights
    actual = penalty_term(Contrast(literal=True, topk=0.4), weights).definition(f_BF, W_dec_FD)
    assert float(actual) == pytest.approx(expected, rel=1e-5)


def test_the_literal_formula_crushes_activations_and_does_not_crash() -> None:
    x_BD = held_out()
    literal, full = trained(config(contrast=Contrast(literal=True, coefficient=1.0)), 80), trained(config(), 80)
    literal_fvu, full_fvu = (float(trainer.step(x_BD).fvu) for trainer in (literal, full))
    assert full_fvu < 0.5 < literal_fvu
    # Its norms are part of the encoder, so the published SAE must have them.
    weights, f_BF = literal.weights, literal.finished(1.0).encode(x_BD)
    norm_F = weights.W_dec_FD.norm(dim=1)
    expected_BF = torch.relu(((x_BD - weights.b_dec_D) @ weights.W_enc_DF) * norm_F + weights.b_enc_F) * norm_F
    torch.testing.assert_close(f_BF, expected_BF)


def test_the_literal_formula_has_no_variants() -> None:
    with pytest.raises(ValidationError, match="the literal penalty has no variants: remove every, select"):
        Contrast(literal=True, every=2, select="row", by="direction")
    assert Contrast.model_validate(Contrast(literal=True).model_dump()).literal
