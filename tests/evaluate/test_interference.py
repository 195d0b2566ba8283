import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluate import pairs as pairs_module
from pipeline.evaluate.interference import in_both, relative, same_direction
from pipeline.evaluate.pairs import CrossTerms, SimilarPairs, pair_blocks
from pipeline.evaluate.sparse import SparseLatents
from pipeline.sae.sae import SAE
from pipeline.study.penalties import Contrast
from pipeline.train.contrast import contrastive


def random_sae(seed: int, latents: int) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    W_dec_FD = torch.nn.functional.normalize(torch.randn(latents, 6, generator=generator), dim=1)
    bias_D = torch.randn(6, generator=generator)
    return SAE(W_enc_DF=W_dec_FD.T, b_enc_F=torch.full((latents,), -0.3), W_dec_FD=W_dec_FD, b_dec_D=bias_D)


def measured(sae: SAE, x_BD: torch.Tensor, pairs: SimilarPairs, reconstructed: float) -> dict[str, float]:
    terms = CrossTerms(sae, pairs)
    chunks = [SparseLatents.of(sae.encode(some_BD)) for some_BD in torch.split(x_BD, 7)]
    for block in pair_blocks(lambda: chunks, sae.d_sae):
        terms.update(block)
    return relative(terms, reconstructed)


@given(st.integers(0, 2**31), st.integers(5, 20), st.sampled_from([0.1, 0.3]), st.sampled_from([64, 400, 2**26]))
def test_both_sets_of_pairs_against_sums_written_out(seed: int, latents: int, topk: float, size: int) -> None:
    sae, baseline = random_sae(seed, latents), random_sae(seed + 1, latents)
    x_BD = torch.randn(30, 6, generator=torch.Generator().manual_seed(seed))
    f_BF = sae.encode(x_BD)
    norm = float((sae.decode(f_BF) - sae.b_dec_D).square().sum())
    k = max(1, int(topk * (latents - 1)))
    cosine_FF = sae.W_dec_FD @ sae.W_dec_FD.T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs_module, "BLOCK_BYTES", size)
        results = [measured(sae, x_BD, SimilarPairs.of(of.W_dec_FD, topk), norm) for of in (sae, baseline)]
    for result, selecting in zip(results, (sae, baseline), strict=True):
        similar_FF = selecting.W_dec_FD @ selecting.W_dec_FD.T
        others = {
            i: sorted((float(similar_FF[i, j]) for j in range(latents) if j != i), reverse=True) for i in range(latents)
        }
        pairs = [
            (i, j)
            for i, j in itertools.combinations(range(latents), 2)
            if float(similar_FF[i, j]) >= min(others[i][k - 1], others[j][k - 1]) - 1e-7
        ]
        products = {(i, j): float((f_BF[:, i] * f_BF[:, j]).sum()) for i, j in pairs}
        assert result["pairs"] == len(pairs)
        crossed = sum(float(cosine_FF[pair]) * product for pair, product in products.items())
        assert result["interference"] == pytest.approx(2 * crossed / norm, rel=1e-3, abs=1e-6)
        assert result["co_activation"] == pytest.approx(2 * sum(products.values()) / norm, rel=1e-3, abs=1e-6)


def test_on_its_own_pairs_it_is_the_penalty_relative_to_the_reconstruction() -> None:
    sae = random_sae(0, 40)
    x_BD = torch.randn(200, 6, generator=torch.Generator().manual_seed(1))
    f_BF = sae.encode(x_BD)
    mean_norm = float((sae.decode(f_BF) - sae.b_dec_D).square().sum(dim=1).mean())
    penalty = float(contrastive(f_BF, sae.W_dec_FD, Contrast(topk=0.2)))
    result = measured(sae, x_BD, SimilarPairs.of(sae.W_dec_FD, 0.2), mean_norm * len(x_BD))
    assert result["interference"] == pytest.approx(2 * penalty / mean_norm, rel=1e-4)


def test_all_pairs_and_the_squares_make_up_the_reconstruction() -> None:
    sae = random_sae(0, 12)
    x_BD = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    f_BF = sae.encode(x_BD)
    norm = float((sae.decode(f_BF) - sae.b_dec_D).square().sum())
    everything = measured(sae, x_BD, SimilarPairs.of(sae.W_dec_FD, 1.0), norm)
    assert everything["pairs"] == 66
    assert everything["interference"] + float(f_BF.square().sum()) / norm == pytest.approx(1, rel=1e-4)


def test_an_index_means_the_same_latent_as_far_as_directions_agree() -> None:
    sae = random_sae(0, 12)
    alive_F = torch.arange(12) < 8
    assert same_direction(sae.W_dec_FD, sae.W_dec_FD, alive_F) == pytest.approx(1)
    # Dead latents did not move, and say nothing about those that fire.
    other_FD = torch.where(alive_F[:, None], -sae.W_dec_FD, sae.W_dec_FD)
    assert same_direction(sae.W_dec_FD, other_FD, alive_F) == pytest.approx(-1)
    assert same_direction(sae.W_dec_FD, other_FD, alive_F & False) is None


def test_pairs_piled_up_at_the_threshold_are_not_all_taken() -> None:
    """Cosines that differ by less than rounding made up to 3 % too many pairs where many lie at the threshold."""
    angles = torch.linspace(0, 2e-4, 30, dtype=torch.float64)
    W_dec_FD = torch.stack([angles.cos(), angles.sin()], dim=1).float()
    k = max(1, int(0.1 * 29))
    mask_FF = SimilarPairs.of(W_dec_FD, 0.1).mask(slice(0, 30))
    assert int(mask_FF.sum()) <= 30 * k


def test_on_the_pairs_of_either_two_saes_are_measured_alike() -> None:
    """Exchanged, they give the opposite difference, which on the pairs of one of them they do not."""
    sae, other = random_sae(0, 40), random_sae(1, 40)
    x_BD = torch.randn(300, 6, generator=torch.Generator().manual_seed(1))
    pairs = SimilarPairs.of(sae.W_dec_FD, 0.1), SimilarPairs.of(other.W_dec_FD, 0.1)
    norms = [float((each.decode(each.encode(x_BD)) - each.b_dec_D).square().sum()) for each in (sae, other)]
    both = [measured(each, x_BD, pairs[0] | pairs[1], norm) for each, norm in zip((sae, other), norms, strict=True)]
    change = in_both(both[0], both[1])["change"]
    assert change == -in_both(both[1], both[0])["change"]
    # Two draws of one distribution: on the pairs of the other each has far less than on its own, and on both about the same.
    own, fixed = measured(sae, x_BD, pairs[0], norms[0]), measured(sae, x_BD, pairs[1], norms[0])
    assert own["interference"] - fixed["interference"] > 3 * abs(change)
    assert in_both(both[0], both[1] | {"interference": None})["change"] is None  # pyright: ignore[reportArgumentType]


def test_nothing_reconstructed_gives_no_number() -> None:
    sae = random_sae(0, 12)
    assert measured(sae, torch.zeros(3, 6), SimilarPairs.of(sae.W_dec_FD, 0.1), 0.0)["interference"] is None
