"""TopK and BatchTopK beside the trainers of `dictionary_learning` and SAELens: fifty steps from the same weights."""

import sys
import types
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runtime.compatibility import importing_sae_bench
from pipeline.sae.topk import BatchTopK, Selecting, TopK
from pipeline.study.penalties import Contrast
from pipeline.study.recipe import AuxK, TrainConfig
from pipeline.train import losses
from pipeline.train.auxk import AuxKTerm
from pipeline.train.contrast import ContrastTerm
from pipeline.train.gradients import closed_form
from pipeline.train.losses import Objective
from pipeline.train.sparse_step import sparse_form
from pipeline.train.step import Trainer
from pipeline.train.weights import Weights

D_IN, D_SAE, ROWS, K = 16, 48, 64, 4


def batches(count: int) -> list[torch.Tensor]:
    """Rows with E||x||^2 = 1 that have some structure: sums of few of 24 directions."""
    generator = torch.Generator().manual_seed(3)
    directions = torch.nn.functional.normalize(torch.randn(24, D_IN, generator=generator), dim=1)
    made: list[torch.Tensor] = []
    for _ in range(count):
        x_BD = (torch.rand(ROWS, 24, generator=generator) < 0.15).float() @ directions
        x_BD += 0.05 * torch.randn(ROWS, D_IN, generator=generator)  # equal rows would give equal activations: ties
        made.append(x_BD / x_BD.square().sum(dim=1).mean().sqrt())
    return made


@pytest.fixture
def dictionary_learning(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its trainers. The package imports nnsight, which only its activation buffers use."""
    monkeypatch.setitem(sys.modules, "nnsight", types.SimpleNamespace(LanguageModel=object))
    pytest.importorskip("dictionary_learning", reason="dictionary-learning is not installed (extra `bench`)")
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    return {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}


@pytest.mark.parametrize("dead_after", [10_000_000, 5 * ROWS])
@pytest.mark.parametrize("activation", ["topk", "batchtopk"])
def test_fifty_steps_are_those_of_dictionary_learning(dictionary_learning: Any, activation: str, dead_after: int) -> None:
    """With AuxK. Two things of theirs are not ours: b_dec begins at the median of the rows, and long gradients are cut."""
    recipe = TrainConfig(
        d_sae=D_SAE, steps=60, batch_size=ROWS, activation=activation, k=K, auxk=AuxK(dead_after=dead_after),
        learning_rate=1e-3, lr_warmup=5, l1_warmup=0, lr_decay=0.2, decoder_norm="unit", contrast=None, resets=None,
    )  # fmt: skip
    ours = Trainer(config=recipe, d_in=D_IN, seed=0)
    # Half of the latents never fire by themselves.
    ours.weights.b_enc_F[: D_SAE // 2] = -0.5
    theirs = dictionary_learning[activation](
        steps=60, activation_dim=D_IN, dict_size=D_SAE, k=K, layer=0, lm_name="", lr=1e-3, warmup_steps=5, decay_start=48,
        device="cpu",
    )  # fmt: skip
    theirs.dead_feature_threshold = dead_after
    stream = batches(50)
    with torch.no_grad():
        ours.weights.b_dec_D.copy_(theirs.geometric_median(stream[0]) if activation == "batchtopk" else median(stream[0]))
        theirs.ae.encoder.weight.copy_(ours.weights.W_enc_DF.T)
        theirs.ae.encoder.bias.copy_(ours.weights.b_enc_F)
        theirs.ae.decoder.weight.copy_(ours.weights.W_dec_FD.T)
    before = ours.weights.W_dec_FD.clone()
    revived = 0.0
    for step, x_BD in enumerate(stream):
        revived += float(ours.step(x_BD).terms["auxk"])
        theirs.update(step, x_BD)
    assert (revived > 0) == (dead_after == 5 * ROWS)
    assert float((ours.weights.W_dec_FD - before).abs().max()) > 1e-2
    for actual, expected in (
        (ours.weights.W_enc_DF, theirs.ae.encoder.weight.T),
        (ours.weights.b_enc_F, theirs.ae.encoder.bias),
        (ours.weights.W_dec_FD, theirs.ae.decoder.weight.T),
        (ours.weights.b_dec_D, theirs.ae.b_dec),
    ):
        torch.testing.assert_close(actual, expected.detach(), atol=1e-5, rtol=0)


def median(x_BD: torch.Tensor) -> torch.Tensor:
    from dictionary_learning.trainers.top_k import geometric_median

    return geometric_median(x_BD)


def test_batchtopk_follows_saelens_threshold() -> None:
    """The moving average of SAELens begins at 0, ours at the first batch; after 500 batches nothing is left of that."""
    with importing_sae_bench():
        from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    theirs = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K))
    ours, norm_F = BatchTopK(K), torch.ones(D_SAE)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1500):
        pre_BF = torch.randn(ROWS, D_SAE, generator=generator)
        f_BF = ours.in_training(pre_BF, norm_F)
        ours.observe(f_BF, norm_F)
        theirs.update_topk_threshold(f_BF)
    assert ours.average is not None
    torch.testing.assert_close(ours.average, theirs.topk_threshold.float(), rtol=1e-4, atol=1e-4)


@given(st.integers(0, 2**31), st.sampled_from([TopK(3), BatchTopK(3)]), st.booleans())
def test_a_step_has_the_gradient_of_its_definition(seed: int, activation: Selecting, penalised: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    W_dec_FD = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    weights = Weights(
        W_enc_DF=torch.randn(6, 20, generator=generator, dtype=torch.float64),
        b_enc_F=torch.randn(20, generator=generator, dtype=torch.float64),
        W_dec_FD=W_dec_FD,
        b_dec_D=torch.randn(6, generator=generator, dtype=torch.float64),
    )
    x_BD = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    penalty = ContrastTerm(Contrast(), weights) if penalised else None
    if penalty:
        penalty.prepare(0)
    dead_F = torch.rand(20, generator=generator) < 0.7
    objective = Objective(
        activation=activation, l1=0.0, penalty=penalty, weight=0.7, auxk=AuxKTerm(weight=0.3, kept=3, dead_F=dead_F)
    )
    defined = losses.differentiated(weights, x_BD, objective)
    for form in (closed_form, sparse_form):
        fast = form(weights, x_BD, objective)
        for name, value in defined.terms.items():
            torch.testing.assert_close(fast.terms[name], value, rtol=1e-9, atol=1e-10)
        for one, other in zip(fast.gradient.tensors(), defined.gradient.tensors(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)
        torch.testing.assert_close(fast.firings_F, defined.firings_F.double())
        scale = fast.residual_BD.norm() / defined.residual_BD.norm()
        torch.testing.assert_close(fast.residual_BD, defined.residual_BD * scale)
