"""The loss against its definition, written out (docs/method.md, "The loss"). d_sae and d_in always differ."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.sae.activations import RELU
from pipeline.study.penalties import Contrast
from pipeline.train.contrast import contrastive, pair_mask
from pipeline.train.losses import reconstruction

shapes = st.tuples(st.integers(1, 6), st.integers(2, 5), st.integers(3, 9)).filter(lambda shape: shape[1] != shape[2])
seeds = st.integers(0, 2**31)
fractions = st.floats(0.01, 1.0)


def random_sae(shape: tuple[int, int, int], seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows [B, D], latents [B, F] and decoder [F, D] in float64."""
    rows, d_in, d_sae = shape
    generator = torch.Generator().manual_seed(seed)
    x_BD = torch.randn(rows, d_in, generator=generator, dtype=torch.float64)
    f_BF = torch.randn(rows, d_sae, generator=generator, dtype=torch.float64).relu()
    W_dec_FD = torch.randn(d_sae, d_in, generator=generator, dtype=torch.float64)
    return x_BD, f_BF, W_dec_FD


def mask_by_definition(similarity_FF: torch.Tensor, topk: float) -> torch.Tensor:
    latents = len(similarity_FF)
    k = max(1, int(topk * (latents - 1)))
    threshold = [
        sorted((float(similarity_FF[i, j]) for j in range(latents) if j != i), reverse=True)[k - 1] for i in range(latents)
    ]
    return torch.tensor(
        [
            [i != j and float(similarity_FF[i, j]) >= min(threshold[i], threshold[j]) for j in range(latents)]
            for i in range(latents)
        ]
    )


@given(shapes, seeds, fractions)
def test_the_mask_is_the_union_of_row_and_column(shape: tuple[int, int, int], seed: int, topk: float) -> None:
    _, _, W_dec_FD = random_sae(shape, seed)
    similarity_FF = W_dec_FD @ W_dec_FD.T
    similarity_FF = (similarity_FF + similarity_FF.T) / 2  # the definition assumes a symmetry that rounding breaks
    assert torch.equal(pair_mask(similarity_FF, topk), mask_by_definition(similarity_FF, topk))


@given(shapes, seeds, fractions)
def test_row_and_column_selection_are_one_loss_and_the_mean_of_union_and_mutual(
    shape: tuple[int, int, int], seed: int, topk: float
) -> None:
    _, f_BF, W_dec_FD = random_sae(shape, seed)
    direction_FD = W_dec_FD / W_dec_FD.norm(dim=1, keepdim=True)
    cosine_FF = direction_FD @ direction_FD.T
    others_FF = cosine_FF.clone().fill_diagonal_(-torch.inf)
    k = max(1, int(topk * (len(cosine_FF) - 1)))
    row_FF = others_FF >= others_FF.topk(k, dim=1).values[:, -1:]
    pairs_FF = cosine_FF * (f_BF.T @ f_BF)
    row, column = (row_FF * pairs_FF).sum(), (row_FF.T * pairs_FF).sum()
    union, mutual = ((row_FF | row_FF.T) * pairs_FF).sum(), ((row_FF & row_FF.T) * pairs_FF).sum()
    torch.testing.assert_close(row, column)
    torch.testing.assert_close(row, (union + mutual) / 2)


@given(shapes, seeds, fractions, st.sampled_from(["direction", "magnitude"]))
def test_the_weighted_penalty_is_its_double_sum(shape: tuple[int, int, int], seed: int, topk: float, by: str) -> None:
    _, f_BF, W_dec_FD = random_sae(shape, seed)
    rows, latents = f_BF.shape
    norm_F = W_dec_FD.norm(dim=1)
    dot_FF = W_dec_FD @ W_dec_FD.T
    similarity_FF = dot_FF / (norm_F[:, None] * norm_F) if by == "direction" else dot_FF
    strength_BF = f_BF * norm_F if by == "direction" else f_BF
    mask_FF = pair_mask(similarity_FF, topk)
    expected = sum(
        float(similarity_FF[i, j] * (strength_BF[:, i] * strength_BF[:, j]).sum() / rows)
        for i in range(latents)
        for j in range(i + 1, latents)
        if mask_FF[i, j]
    )
    config = Contrast(topk=topk, by=by)  # pyright: ignore[reportArgumentType]
    assert float(contrastive(f_BF, W_dec_FD, config)) == pytest.approx(expected, abs=1e-9)


@given(shapes, seeds, fractions)
def test_direction_and_magnitude_coincide_under_unit_norm(shape: tuple[int, int, int], seed: int, topk: float) -> None:
    _, f_BF, W_dec_FD = random_sae(shape, seed)
    unit_FD = W_dec_FD / W_dec_FD.norm(dim=1, keepdim=True)
    by_direction = contrastive(f_BF, unit_FD, Contrast(topk=topk, by="direction"))
    by_magnitude = contrastive(f_BF, unit_FD, Contrast(topk=topk, by="magnitude"))
    # Ties at the threshold may fall on either side by a rounding error, which the masks then disagree on.
    dot_FF, cosine_FF = (
        unit_FD @ unit_FD.T,
        torch.nn.functional.normalize(unit_FD) @ torch.nn.functional.normalize(unit_FD).T,
    )
    if torch.equal(pair_mask(dot_FF, topk), pair_mask(cosine_FF, topk)):
        torch.testing.assert_close(by_direction, by_magnitude)


@given(shapes, seeds, fractions)
def test_the_directional_penalty_and_sparsity_do_not_see_how_a_latent_is_scaled(
    shape: tuple[int, int, int], seed: int, topk: float
) -> None:
    _, f_BF, W_dec_FD = random_sae(shape, seed)
    # Powers of two, so that scaling rounds nothing and no tie at the threshold breaks.
    factor_F = 2.0 ** torch.randint(-3, 4, (W_dec_FD.shape[0],), generator=torch.Generator().manual_seed(seed)).double()
    scaled_f_BF, scaled_W_dec_FD = f_BF / factor_F, W_dec_FD * factor_F[:, None]
    config = Contrast(topk=topk)
    torch.testing.assert_close(contrastive(scaled_f_BF, scaled_W_dec_FD, config), contrastive(f_BF, W_dec_FD, config))
    torch.testing.assert_close(
        RELU.sparsity(scaled_f_BF, scaled_f_BF, scaled_W_dec_FD.norm(dim=1)), RELU.sparsity(f_BF, f_BF, W_dec_FD.norm(dim=1))
    )


@given(shapes, seeds)
def test_gradients_of_the_full_penalty_are_the_closed_form(shape: tuple[int, int, int], seed: int) -> None:
    _, f_BF, W_dec_FD = random_sae(shape, seed)
    f_BF.requires_grad_()
    W_dec_FD.requires_grad_()
    config = Contrast(topk=0.3)
    contrastive(f_BF, W_dec_FD, config).backward()
    with torch.no_grad():
        norm_F = W_dec_FD.norm(dim=1)
        direction_FD = W_dec_FD / norm_F[:, None]
        cosine_FF = direction_FD @ direction_FD.T
        mask_FF = pair_mask(cosine_FF, config.topk)
        strength_BF = f_BF * norm_F
        f_gradient = strength_BF @ (mask_FF * cosine_FF) / len(f_BF) * norm_F
        direction_gradient = (mask_FF * (strength_BF.T @ strength_BF) / len(f_BF)) @ direction_FD
        radial = (direction_gradient * direction_FD).sum(dim=1, keepdim=True) * direction_FD
        W_gradient = (direction_gradient - radial) / norm_F[:, None]
    torch.testing.assert_close(f_BF.grad, f_gradient)
    torch.testing.assert_close(W_dec_FD.grad, W_gradient)


@given(shapes, seeds)
def test_the_directional_penalty_leaves_norms_alone_and_the_other_does_not(shape: tuple[int, int, int], seed: int) -> None:
    _, f_BF, W_dec_FD = random_sae(shape, seed)
    f_BF = f_BF + 0.5
    for by in ("direction", "magnitude"):
        weights_FD = W_dec_FD.clone().requires_grad_()
        contrastive(f_BF, weights_FD, Contrast(topk=1.0, by=by)).backward()
        assert weights_FD.grad is not None
        radial_F = (weights_FD.grad * W_dec_FD).sum(dim=1)
        assert bool((radial_F.abs() < 1e-9).all()) == (by == "direction")


def test_the_unweighted_penalty_counts_every_pair_the_same() -> None:
    _, f_BF, W_dec_FD = random_sae((4, 3, 5), 0)
    config = Contrast(topk=0.5, weighted=False)
    direction_FD = W_dec_FD / W_dec_FD.norm(dim=1, keepdim=True)
    cosine_FF = direction_FD @ direction_FD.T
    expected = (pair_mask(cosine_FF, 0.5) * cosine_FF).sum() / (2 * 5)
    torch.testing.assert_close(contrastive(f_BF, W_dec_FD, config), expected)
    torch.testing.assert_close(contrastive(100 * f_BF, W_dec_FD, config), expected)


def test_terms_on_a_case_worked_by_hand() -> None:
    x_BD = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert float(reconstruction(x_BD, torch.zeros(2, 2))) == 13.0
    f_BF = torch.tensor([[1.0, 2.0], [0.0, 4.0]])
    assert float(RELU.sparsity(f_BF, f_BF, torch.tensor([3.0, 0.5]))) == pytest.approx((3 + 1 + 2) / 2)
    # Two latents at 60 degrees: cos 1/2; mean over rows of a_1 a_2 = (1 x 2 + 0 x 4) / 2 = 1.
    W_dec_FD = torch.tensor([[1.0, 0.0], [0.5, 3**0.5 / 2]])
    assert float(contrastive(f_BF, W_dec_FD, Contrast())) == pytest.approx(0.5)
