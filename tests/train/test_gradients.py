"""The closed form and its contrast kernels against the definition differentiated by autograd, in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.runtime import devices
from pipeline.sae.activations import RELU
from pipeline.study.penalties import Contrast
from pipeline.study.recipe import TrainConfig
from pipeline.train import losses, pair_dense, pair_firings, pair_kernels, pair_selection
from pipeline.train.contrast import contrastive
from pipeline.train.diagnostics import geometry
from pipeline.train.gradients import closed_form
from pipeline.train.losses import Differentiated, Objective
from pipeline.train.pair_dense import by_blocks, by_squares
from pipeline.train.pair_firings import by_rows, by_table
from pipeline.train.pair_kernels import Kernel
from pipeline.train.penalty import PenaltyTerm, penalty_term
from pipeline.train.step import Trainer
from pipeline.train.weights import Weights, decoder_norms

shapes = st.tuples(st.integers(1, 7), st.integers(2, 6), st.integers(4, 12)).filter(lambda shape: shape[1] != shape[2])
seeds = st.integers(0, 2**31)
contrasts = st.builds(
    Contrast,
    by=st.sampled_from(["direction", "magnitude"]),
    select=st.sampled_from(["union", "row", "mutual"]),
    topk=st.floats(0.01, 1.0),
    weighted=st.booleans(),
)

KERNELS: list[Kernel] = [by_blocks, by_squares, by_table, by_rows]


def random_weights(d_in: int, d_sae: int, generator: torch.Generator) -> Weights:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Weights(
        W_enc_DF=normal(d_in, d_sae),
        b_enc_F=0.3 * normal(d_sae),
        W_dec_FD=normal(d_sae, d_in),
        b_dec_D=0.2 * normal(d_in),
    )


def objective(weights: Weights, contrast: Contrast | None, *, l1: float = 0.3, weight: float = 0.7) -> Objective:
    """The loss of an arm with this contrast, its thresholds computed."""
    penalty = penalty_term(contrast, weights) if contrast else None
    if penalty:
        penalty.prepare(0)
    return Objective(activation=RELU, l1=l1, penalty=penalty, weight=weight)


def both(
    weights: Weights, x_BD: torch.Tensor, contrast: Contrast | None, **precision: Any
) -> tuple[Differentiated, Differentiated]:
    """A batch differentiated by the definition and by the closed form."""
    loss = objective(weights, contrast)
    return losses.differentiated(weights, x_BD, loss), closed_form(weights, x_BD, loss, **precision)


def assert_same(one: Differentiated, other: Differentiated, **tolerance: float) -> None:
    assert list(one.terms) == list(other.terms)
    for term, expected in one.terms.items():
        torch.testing.assert_close(other.terms[term], expected, **tolerance)
    for (name, expected), actual in zip(one.gradient.named(), other.gradient.tensors(), strict=True):
        torch.testing.assert_close(actual, expected, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
    torch.testing.assert_close(other.firings_F.long(), one.firings_F)


@given(shapes, seeds, st.none() | contrasts, st.sampled_from(KERNELS))
def test_losses_and_gradients_are_those_of_autograd(
    shape: tuple[int, int, int], seed: int, contrast: Contrast | None, kernel: Kernel
) -> None:
    rows, d_in, d_sae = shape
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(d_in, d_sae, generator)
    x_BD = torch.randn(rows, d_in, generator=generator, dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        # Any kernel, whichever would be chosen; unweighted pairs are all pairs, which the sparse ones do not know.
        patch.setattr(pair_kernels, "kernel_for", lambda pairs: kernel if pairs.config.weighted else by_blocks)
        patch.setattr(pair_dense, "SMALL", 2)
        patch.setattr(pair_dense, "TALL", 3)
        patch.setattr(pair_dense, "WIDE", 4)
        patch.setattr(pair_firings, "GATHERED", 3 * d_in * d_sae)
        patch.setattr(devices, "PANEL_BYTES", 4 * 3 * d_sae)
        assert_same(*both(weights, x_BD, contrast), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("select", ["union", "row", "mutual"])
def test_kernels_are_the_definition_beyond_one_block(kernel: Kernel, select: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = random_weights(24, 500, generator)
    x_BD = torch.randn(60, 24, generator=generator, dtype=torch.float64)
    monkeypatch.setattr(pair_kernels, "kernel_for", lambda _: kernel)
    monkeypatch.setattr(pair_dense, "HALVED", 400)  # several blocks of `by_squares`
    contrast = Contrast.model_validate({"select": select})
    assert_same(*both(weights, x_BD, contrast), rtol=1e-9, atol=1e-10)


@given(seeds, contrasts)
def test_selecting_by_row_is_the_mean_of_union_and_mutual(seed: int, contrast: Contrast) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = random_weights(5, 9, generator)
    x_BD = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    row, union, mutual = (
        losses.differentiated(
            weights, x_BD, objective(weights, contrast.model_copy(update={"select": select}), l1=0.0, weight=1.0)
        )
        for select in ("row", "union", "mutual")
    )
    torch.testing.assert_close(row.terms["contrast"], (union.terms["contrast"] + mutual.terms["contrast"]) / 2)
    for one, other, third in zip(row.gradient.tensors(), union.gradient.tensors(), mutual.gradient.tensors(), strict=True):
        torch.testing.assert_close(one, (other + third) / 2)


def test_which_kernel_is_cheaper_depends_on_how_many_fire() -> None:
    def chosen(firing: int, d_sae: int, d_in: int, **changes: object) -> Kernel:
        W_dec_FD = torch.ones(d_sae, d_in)
        return pair_kernels.kernel_for(
            pair_selection.SelectedPairs(
                f_BF=torch.ones(2048, 1).expand(2048, d_sae),
                firing_B=torch.full((2048,), firing),
                W_dec_FD=W_dec_FD,
                norm_F=W_dec_FD[:, 0],
                threshold_F=W_dec_FD[:, 0],
                config=Contrast.model_validate(changes),
            )
        )

    assert chosen(50, 6144, 768) is by_rows
    assert chosen(50, 1536, 192) is by_table
    assert chosen(400, 1536, 192) is by_blocks
    assert chosen(50, 1536, 192, weighted=False) is by_blocks


class Spread(PenaltyTerm):
    """A penalty with nothing but its definition."""

    name = "spread"

    def definition(self, f_BF: torch.Tensor, W_dec_FD: torch.Tensor) -> torch.Tensor:
        return (f_BF.mean(dim=0) * W_dec_FD.norm(dim=1)).square().sum()


def test_a_penalty_needs_no_more_than_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    weights = random_weights(5, 9, generator)
    x_BD = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    loss = Objective(activation=RELU, l1=0.3, penalty=Spread(None, weights), weight=0.7)
    expected, actual = losses.differentiated(weights, x_BD, loss), closed_form(weights, x_BD, loss)
    assert_same(expected, actual, rtol=1e-9, atol=1e-10)
    assert float(actual.terms["spread"]) > 0


@pytest.mark.parametrize("part", ["step", "contrast"])
def test_bfloat16_products_are_near_and_not_the_same(part: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = random_weights(64, 96, generator)
    weights = Weights(**{name: tensor.float() for name, tensor in weights.named()})
    x_BD = torch.randn(256, 64, generator=generator)
    contrast = Contrast(precision="bfloat16" if part == "contrast" else "float32")
    expected, actual = both(weights, x_BD, contrast, precision="bfloat16" if part == "step" else "float32")
    for one, other in zip(expected.gradient.tensors(), actual.gradient.tensors(), strict=True):
        assert other.dtype == torch.float32
        assert 1e-6 < float((one - other).norm() / one.norm()) < 0.02


def test_latents_that_are_zero_or_never_fire_have_finite_gradients() -> None:
    weights = random_weights(5, 9, torch.Generator().manual_seed(0))
    weights.W_dec_FD[2] = 0
    weights.b_enc_F[3] = -1e3
    silent = Weights(**dict(weights.named()) | {"b_enc_F": torch.full_like(weights.b_enc_F, -1e3)})
    x_BD = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for case in (weights, silent):
        for contrast in (Contrast(), Contrast(by="magnitude"), Contrast(weighted=False)):
            _, actual = both(case, x_BD, contrast)
            assert all(bool(gradient.isfinite().all()) for gradient in actual.gradient.tensors())


def test_thresholds_are_the_kth_largest_similarities_to_others() -> None:
    W_dec_FD = random_weights(6, 400, torch.Generator().manual_seed(0)).W_dec_FD
    cosine_FF = torch.nn.functional.normalize(W_dec_FD) @ torch.nn.functional.normalize(W_dec_FD).T
    ordered_FF = cosine_FF.fill_diagonal_(-torch.inf).sort(dim=1, descending=True).values
    threshold_F, nearest_F = pair_selection.thresholds(W_dec_FD, decoder_norms(W_dec_FD), Contrast(topk=0.1))
    torch.testing.assert_close(threshold_F, ordered_FF[:, 38])  # k = int(0.1 x 399)
    torch.testing.assert_close(nearest_F, ordered_FF[:, 0])
    everything_F, _ = pair_selection.thresholds(W_dec_FD, decoder_norms(W_dec_FD), Contrast(topk=1.0))
    assert bool((everything_F == -torch.inf).all())


def test_geometry_is_what_it_says_for_an_arm_without_contrast() -> None:
    trainer = Trainer(config=TrainConfig(d_sae=30, steps=10, contrast=None, resets=None), d_in=7, seed=0)
    x_BD = torch.randn(40, 7, generator=torch.Generator().manual_seed(0))
    weights = trainer.weights
    weights.W_dec_FD.mul_(torch.linspace(0.5, 2, 30)[:, None])
    f_BF = torch.relu((x_BD - weights.b_dec_D) @ weights.W_enc_DF + weights.b_enc_F)
    cosine_FF = torch.nn.functional.normalize(weights.W_dec_FD) @ torch.nn.functional.normalize(weights.W_dec_FD).T
    measured = geometry(weights, x_BD, RELU, None)
    torch.testing.assert_close(measured.interference, contrastive(f_BF, weights.W_dec_FD, Contrast()))
    torch.testing.assert_close(measured.nearest, cosine_FF.fill_diagonal_(-1).amax(dim=1).mean())


def as_tf32(x: torch.Tensor) -> torch.Tensor:
    """Rounded to 10 bits of mantissa, to nearest, as a GPU's tensor cores take float32 factors."""
    return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def test_masks_in_tf32_select_nearly_the_same_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    # Latents in groups that point the same way, as trained ones do.
    near_FD = torch.randn(64, 256, generator=generator).repeat_interleave(16, dim=0)
    W_dec_FD = near_FD + torch.randn(1024, 256, generator=generator)
    masks: list[torch.Tensor] = []
    for W_FD in (W_dec_FD, as_tf32(W_dec_FD)):
        norm_F = decoder_norms(W_dec_FD)
        threshold_F, _ = pair_selection.thresholds(W_FD, norm_F, Contrast())
        cosine_FF = (W_FD @ W_FD.T) / (norm_F[:, None] * norm_F)
        masks.append((cosine_FF >= torch.minimum(threshold_F[:, None], threshold_F)).fill_diagonal_(False))
    exact_FF, rounded_FF = masks
    shared = float((exact_FF & rounded_FF).sum() / (exact_FF | rounded_FF).sum())
    assert 0.998 < shared < 1
