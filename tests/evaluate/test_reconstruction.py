import itertools
import math

import pytest
import torch

from pipeline.errors import DegenerateSAEError
from pipeline.evaluate import pairs
from pipeline.evaluate.reconstruction import Reconstruction
from pipeline.evaluate.sparse import SparseLatents
from pipeline.sae.sae import SAE


def test_metrics_on_a_case_worked_by_hand() -> None:
    sae = SAE(
        W_enc_DF=torch.tensor([[1.0, 0.0, 0.6], [0.0, 1.0, 0.8]]),
        b_enc_F=torch.tensor([0.0, 0.0, -100.0]),
        W_dec_FD=torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]),
        b_dec_D=torch.zeros(2),
    )
    # Latents fire on positive coordinates; only the negative one of the last row is lost.
    x_BD = torch.tensor([[3.0, 0.0], [0.0, 4.0], [3.0, 4.0], [2.0, -4.0]])
    metrics = Reconstruction(sae)
    for rows_BD in x_BD.split(3):
        metrics.update(rows_BD, SparseLatents.of(sae.encode(rows_BD)))
    result = metrics.compute()
    variance = float((x_BD - x_BD.mean(dim=0)).square().sum())
    assert result["rows"] == 4
    assert result["fvu"] == pytest.approx(16 / variance)
    assert result["cosine"] == pytest.approx((1 + 1 + 1 + 2 / 20**0.5) / 4)
    assert result["l0"] == pytest.approx((1 + 1 + 2 + 1) / 4)
    assert result["dead_fraction"] == pytest.approx(1 / 3)
    assert result["max_decoder_cosine"] == pytest.approx((0.6 + 0.8 + 0.8) / 3)
    assert result["explained_variance"] == pytest.approx(1 - 16 / variance)


def some_sae(latents: int, scale: float = 1.0) -> SAE:
    generator = torch.Generator().manual_seed(0)
    W_dec_FD = torch.nn.functional.normalize(torch.randn(latents, 5, generator=generator), dim=1)
    bias_F = -torch.rand(latents, generator=generator)
    return SAE(W_enc_DF=scale * W_dec_FD.T, b_enc_F=bias_F, W_dec_FD=W_dec_FD, b_dec_D=torch.ones(5))


@pytest.mark.parametrize("block_bytes", [64, 2**26])
def test_histograms_and_aggregates_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch, block_bytes: int) -> None:
    monkeypatch.setattr(pairs, "BLOCK_BYTES", block_bytes)
    sae = some_sae(30)
    x_BD = torch.randn(400, 5, generator=torch.Generator().manual_seed(1))
    metrics = Reconstruction(sae)
    for rows_BD in x_BD.split(90):
        metrics.update(rows_BD, SparseLatents.of(sae.encode(rows_BD)))
    result = metrics.compute()
    f_BF = sae.encode(x_BD)
    assert float(metrics.reconstructed) == pytest.approx(float((f_BF @ sae.W_dec_FD).square().sum()), rel=1e-5)

    density = result["density"]
    share = [int((f_BF[:, latent] > 0).sum()) / 400 for latent in range(30)]
    assert density["dead"] == share.count(0)
    assert density["edges"][0] == -6
    assert density["edges"][-1] == 0
    for low, high, count in zip(density["edges"], density["edges"][1:], density["counts"], strict=False):
        inside = [p for p in share if p and (low <= math.log10(p) < high or (p == 1 and high == 0))]
        assert count == len(inside), (low, high)

    cosine_FF = sae.W_dec_FD @ sae.W_dec_FD.T
    unordered = [float(cosine_FF[i, j]) for i, j in itertools.combinations(range(30), 2)]
    cosines = result["decoder_cosine"]
    assert sum(cosines["counts"]) == len(unordered)
    for low, high, count in zip(cosines["edges"], cosines["edges"][1:], cosines["counts"], strict=False):
        assert count == sum(low <= cosine < high for cosine in unordered), (low, high)
    largest = [max(float(cosine_FF[i, j]) for j in range(30) if j != i) for i in range(30)]
    assert result["max_decoder_cosine"] == pytest.approx(sum(largest) / 30, rel=1e-5)


def test_a_reconstruction_that_is_not_finite_is_degenerate() -> None:
    sae = some_sae(8, scale=float("inf"))
    metrics = Reconstruction(sae)
    x_BD = torch.ones(3, 5) * 2
    metrics.update(x_BD, SparseLatents.of(sae.encode(x_BD)))
    with pytest.raises(DegenerateSAEError, match="reconstructions of held-out rows are not finite"):
        metrics.compute()


def test_rows_of_zeros_have_no_direction() -> None:
    """A synthetic model draws some. Counted as a cosine of 0, they would keep a perfect SAE from 1."""
    W_dec_FD = torch.eye(3)
    sae = SAE(W_enc_DF=W_dec_FD.T, b_enc_F=torch.zeros(3), W_dec_FD=W_dec_FD, b_dec_D=torch.zeros(3))
    x_BD = torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 0.0], [3.0, 0.1, 1.0]])
    seen = Reconstruction(sae)
    seen.update(x_BD, SparseLatents.of(sae.encode(x_BD)))
    assert seen.compute()["cosine"] == pytest.approx(1)
