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
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    def matryoshka(**options: Any) -> Any:
        # It divides by the number of groups twice, once by these weights; with weights of 1 it takes the mean, as we do.
        return MatryoshkaBatchTopKTrainer(**options, group_fractions=[1 / 4, 1 / 4, 1 / 2], group_weights=[1.0, 1.0, 1.0])

    return {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer, "matryoshka": matryoshka}


@pytest.mark.parametrize("dead_after", [10_000_000, 5 * ROWS])
@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
def test_fifty_steps_are_those_of_dictionary_learning(dictionary_learning: Any, kind: str, dead_after: int) -> None:
    """With AuxK. Two things of theirs are not ours: b_dec begins at the median of the rows, and long gradients are cut."""
    recipe = TrainConfig(
        d_sae=D_SAE, steps=60, batch_size=ROWS, activation="topk" if kind == "topk" else "batchtopk", k=K,
        auxk=AuxK(dead_after=dead_after), prefixes=(12, 24, 48) if kind == "matryoshka" else None,
        learning_rate=1e-3, lr_warmup=5, l1_warmup=0, lr_decay=0.2, decoder_norm="unit", contrast=None, resets=None,
    )  # fmt: skip
    ours = Trainer(config=recipe, d_in=D_IN, seed=0)
    # Half of the latents never fire by themselves.
    ours.weights.b_enc_F[: D_SAE // 2] = -0.5
    theirs = dictionary_learning[kind](
        steps=60, activation_dim=D_IN, dict_size=D_SAE, k=K, layer=0, lm_name="", lr=1e-3, warmup_steps=5, decay_start=48,
        device="cpu",
    )  # fmt: skip
    theirs.dead_feature_threshold = dead_after
    stream = batches(50)
    with torch.no_grad():
        ours.weights.b_dec_D.copy_(median(stream[0]) if kind == "topk" else theirs.geometric_median(stream[0]))
        for tensor, same in zip(weights_of(theirs.ae), ours.weights.tensors()[:3], strict=True):
            tensor.copy_(same)
    before = ours.weights.W_dec_FD.clone()
    revived = 0.0
    for step, x_BD in enumerate(stream):
        revived += float(ours.step(x_BD).terms["auxk"])
        theirs.update(step, x_BD)
    assert (revived > 0) == (dead_after == 5 * ROWS)
    assert float((ours.weights.W_dec_FD - before).abs().max()) > 1e-2
    for actual, expected in zip(ours.weights.tensors(), [*weights_of(theirs.ae), theirs.ae.b_dec], strict=True):
        torch.testing.assert_close(actual, expected.detach(), atol=1e-5, rtol=0)


def weights_of(theirs: Any) -> list[torch.Tensor]:
    """W_enc_DF, b_enc_F and W_dec_FD of an SAE of `dictionary_learning`."""
    if hasattr(theirs, "W_enc"):
        return [theirs.W_enc, theirs.b_enc, theirs.W_dec]
    return [theirs.encoder.weight.T, theirs.encoder.bias, theirs.decoder.weight.T]


def median(x_BD: torch.Tensor) -> torch.Tensor:
    from dictionary_learning.trainers.top_k import geometric_median

    return geometric_median(x_BD)


def test_prefixes_are_those_of_saelens() -> None:
    """It sums what we take the mean of, so its loss is ours times the number of prefixes."""
    with importing_sae_bench():
        from sae_lens import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
        from sae_lens.saes.sae import TrainStepInput

    recipe = TrainConfig(
        d_sae=D_SAE, steps=60, batch_size=ROWS, activation="batchtopk", k=K, prefixes=(12, 24, 48), contrast=None,
        resets=None,
    )  # fmt: skip
    ours = Trainer(config=recipe, d_in=D_IN, seed=0)
    config = MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=D_IN, d_sae=D_SAE, k=K, matryoshka_widths=[12, 24, 48], decoder_init_norm=1.0
    )
    theirs = MatryoshkaBatchTopKTrainingSAE(config)
    for tensor, same in zip([theirs.W_enc, theirs.b_enc, theirs.W_dec], ours.weights.tensors()[:3], strict=True):
        tensor.data.copy_(same)
    (x_BD,) = batches(1)
    step = TrainStepInput(sae_in=x_BD, coefficients={}, dead_neuron_mask=None, n_training_steps=0, is_logging_step=False)
    loss = theirs.training_forward_pass(step).loss
    torch.testing.assert_close(ours.step(x_BD).terms["prefixes"] * 3, loss.detach(), rtol=1e-5, atol=0)


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


@given(st.integers(0, 2**31), st.sampled_from([TopK(3), BatchTopK(3)]), st.booleans(), st.booleans())
def test_a_step_has_the_gradient_of_its_definition(seed: int, activation: Selecting, penalised: bool, nested: bool) -> None:
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
        activation=activation, l1=0.0, penalty=penalty, weight=0.7, auxk=AuxKTerm(weight=0.3, kept=3, dead_F=dead_F),
        prefixes=(3, 11, 20) if nested else (),
    )  # fmt: skip
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
