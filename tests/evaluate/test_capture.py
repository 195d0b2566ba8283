import itertools
import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.evaluate import pairs as pairs_module
from pipeline.evaluate.capture import PAIRS_CURVE, TOPK_CURVE, Capture, largest_but, random_tied
from pipeline.evaluate.pairs import CofiringPairs, firings, pair_blocks, topk_mask
from pipeline.evaluate.sparse import SparseLatents
from pipeline.sae.activation import Activation
from pipeline.sae.activations import RELU
from pipeline.sae.sae import SAE
from pipeline.sae.topk import JumpReLU, TopK
from pipeline.study.sections import EvaluateConfig

CONFIG = EvaluateConfig(k_values=(1,), capture_topk=0.1, live_firings=2, joint_firings=2)


def cofiring(f_BF: torch.Tensor, config: EvaluateConfig = CONFIG) -> CofiringPairs:
    latents, chunks = f_BF.shape[1], [SparseLatents.of(some_BF) for some_BF in torch.split(f_BF, 3)]
    pairs = CofiringPairs(firings(chunks), len(f_BF), config)
    for block in pair_blocks(lambda: chunks, latents):
        pairs.update(block)
    return pairs


def capture(W_dec_FD: torch.Tensor, f_BF: torch.Tensor, config: EvaluateConfig = CONFIG) -> dict[str, Any]:
    return Capture(W_dec_FD, cofiring(f_BF, config), config).compute()


def at_angles(*degrees: float) -> torch.Tensor:
    """Unit vectors of the plane."""
    radians = torch.tensor(degrees).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def test_a_case_worked_by_hand() -> None:
    # Four latents; with k = 1 each one's nearest: 0 -> 1, 1 -> 0, 2 -> 1, 3 -> 2.
    W_dec_FD = at_angles(0, 10, 30, 90)
    assert topk_mask(W_dec_FD, 0.1).nonzero().tolist() == [[0, 1], [1, 0], [2, 1], [3, 2]]
    # Pairs that fire together on at least two rows, by strength: (0,1) 4, (2,3) 3, (0,3) 2, (1,3) 1. Q is the n = 4 largest.
    f_BF = torch.zeros(8, 4)
    for row, (i, j, strength) in enumerate([(0, 1, 4.0), (2, 3, 3.0), (0, 3, 2.0), (1, 3, 1.0)]):
        f_BF[2 * row : 2 * row + 2, [i, j]] = strength**0.5
    result = capture(W_dec_FD, f_BF)
    assert (result["live"], result["pairs"], result["reason"]) == (4, 4, None)
    # Union holds (0,1), (1,2), (2,3) of 6 pairs; of Q it holds (0,1) and (2,3); only (0,1) is mutual.
    assert result["union"] == pytest.approx(2 / 4)
    assert result["mutual"] == pytest.approx(1 / 4)
    assert result["row"] == result["column"] == pytest.approx(3 / 8)
    assert result["chance"] == pytest.approx(3 / 6)
    assert result["lift"] == pytest.approx(1.0)
    assert result["kappa"] == pytest.approx(0.0)


def test_a_pair_must_fire_together_often_enough_and_live_latents_only_count() -> None:
    W_dec_FD = at_angles(0, 10, 30, 90)
    f_BF = torch.zeros(8, 4)
    f_BF[0:3, [0, 1]] = 1.0
    f_BF[3, [0, 2]] = 100.0
    f_BF[4:6, 2] = 1.0
    f_BF[6, 3] = 1.0
    result = capture(W_dec_FD, f_BF)
    assert (result["live"], result["pairs"]) == (3, 1)
    assert result["union"] == 1.0


@pytest.mark.parametrize(
    ("firing", "reason"),
    [([0, 1], "2 latents fire on 2 rows or more"), ([0, 1, 2], "no two latents fire together on 2 rows or more")],
)
def test_what_is_undefined_is_none_with_a_reason_and_never_zero(firing: list[int], reason: str) -> None:
    f_BF = torch.zeros(8, 4)
    for row, latent in enumerate(firing):
        f_BF[2 * row : 2 * row + 2, latent] = 1.0
    result = capture(at_angles(0, 10, 30, 90), f_BF)
    assert result["union"] is None
    assert result["row"] is None
    assert result["reason"] == reason


@given(st.integers(0, 2**31), st.integers(4, 12), st.floats(0.05, 0.5))
def test_row_is_the_mean_of_union_and_mutual_and_labels_do_not_matter(seed: int, latents: int, topk: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    W_dec_FD = torch.nn.functional.normalize(torch.randn(latents, 5, generator=generator), dim=1)
    f_BF = torch.randn(40, latents, generator=generator).relu()
    config = CONFIG.model_copy(update={"capture_topk": topk})
    result = capture(W_dec_FD, f_BF, config)
    assert result["row"] == pytest.approx(result["column"])
    assert result["row"] == pytest.approx((result["union"] + result["mutual"]) / 2)
    assert result["mutual"] <= result["row"] <= result["union"]
    order = torch.randperm(latents, generator=generator)
    renamed = capture(W_dec_FD[order], f_BF[:, order], config)
    assert renamed["chance"] == pytest.approx(result["chance"])
    assert renamed["union"] == pytest.approx(result["union"], abs=1e-6)


def test_permuted_labels_capture_what_chance_says() -> None:
    generator = torch.Generator().manual_seed(0)
    W_dec_FD = torch.nn.functional.normalize(torch.randn(40, 6, generator=generator), dim=1)
    # Latents fire with their direction, so the true labels capture more than chance.
    f_BF = torch.relu(torch.randn(4000, 6, generator=generator) @ W_dec_FD.T - 1)
    true = capture(W_dec_FD, f_BF)
    assert true["union"] > 2 * true["chance"]
    permuted = [capture(W_dec_FD[torch.randperm(40, generator=generator)], f_BF)["union"] for _ in range(40)]
    assert sum(permuted) / len(permuted) == pytest.approx(true["chance"], abs=0.03)
    # The draws that come with the rates are of the same distribution.
    assert true["permuted"]["draws"] == 100
    assert true["permuted"]["mean"] == pytest.approx(true["chance"], abs=0.03)
    assert true["permuted"]["std"] == pytest.approx(statistics.stdev(permuted), rel=0.5)


@pytest.mark.parametrize("activation", [RELU, JumpReLU(torch.linspace(0.1, 0.9, 16))], ids=["relu", "jumprelu"])
@given(seed=st.integers(0, 2**31), l0=st.floats(0.5, 15))
def test_the_random_null_has_the_l0_asked_for(activation: Activation, seed: int, l0: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Not what a first chunk alone would tell: the rows of the last are twice as long.
    x_BD = (torch.randn(200, 8, generator=generator) + 1) * torch.where(torch.arange(200) < 150, 1.0, 2.0)[:, None]
    W_dec_FD = torch.nn.functional.normalize(torch.randn(16, 8, generator=generator), dim=1)
    weights = {"W_enc_DF": W_dec_FD.T, "b_enc_F": torch.zeros(16), "W_dec_FD": W_dec_FD, "b_dec_D": torch.ones(8)}
    sae = SAE(**weights, activation=activation)
    null, other = (random_tied(sae, x_BD.split(50), len(x_BD), l0, draw) for draw in (0, 1))
    assert not torch.allclose(null.W_dec_FD, other.W_dec_FD)
    torch.testing.assert_close(null.W_dec_FD.norm(dim=1), torch.ones(16))
    measured = float((null.encode(x_BD) > 0).sum() / len(x_BD))
    assert measured == pytest.approx(l0, abs=0.02)
    assert not torch.allclose(null.W_dec_FD, W_dec_FD)


def test_the_random_null_of_topk_has_its_k() -> None:
    generator = torch.Generator().manual_seed(0)
    W_dec_FD = torch.nn.functional.normalize(torch.randn(16, 8, generator=generator), dim=1)
    weights = {"W_enc_DF": W_dec_FD.T, "b_enc_F": torch.zeros(16), "W_dec_FD": W_dec_FD, "b_dec_D": torch.zeros(8)}
    x_BD = torch.randn(200, 8, generator=generator)
    null = random_tied(SAE(**weights, activation=TopK(3)), [x_BD], len(x_BD), 3, 0)
    assert float((null.encode(x_BD) > 0).sum() / len(x_BD)) == pytest.approx(3, abs=0.05)


def dense(W_dec_FD: torch.Tensor, f_BF: torch.Tensor, topk: float, q: float, by: str) -> dict[str, Any]:
    """The definition of docs/method.md, "Pair capture", pair by pair."""
    fires_BF = f_BF > 0
    rows, latents = f_BF.shape
    live = [i for i in range(latents) if int(fires_BF[:, i].sum()) >= CONFIG.live_firings]
    n = len(live)
    k = max(1, int(topk * (n - 1)))
    cosine_FF = W_dec_FD @ W_dec_FD.T
    nearest = {i: sorted((j for j in live if j != i), key=lambda j, i=i: (-float(cosine_FF[i, j]), j))[:k] for i in live}
    scores = {}
    for i, j in itertools.combinations(live, 2):
        joint = int((fires_BF[:, i] & fires_BF[:, j]).sum())
        if joint >= CONFIG.joint_firings:
            p_i, p_j = (float(fires_BF[:, latent].double().mean()) for latent in (i, j))
            spread = math.sqrt((p_i * (1 - p_i)) * (p_j * (1 - p_j)))
            if by == "strength":
                scores[i, j] = float((f_BF[:, i] * f_BF[:, j]).sum())
            elif spread:
                scores[i, j] = (joint / rows - p_i * p_j) / spread
    Q = sorted(scores, key=lambda pair: -scores[pair])[: max(1, round(q * n))]
    row = [j in nearest[i] for i, j in Q] + [i in nearest[j] for i, j in Q]
    union = [j in nearest[i] or i in nearest[j] for i, j in Q]
    strength = [scores[pair] for pair in Q]
    return {
        "pairs": len(Q),
        "row": sum(row) / len(row),
        "union": sum(union) / len(Q),
        "mutual": sum(j in nearest[i] and i in nearest[j] for i, j in Q) / len(Q),
        "weighted": sum(s for s, inside in zip(strength, union, strict=True) if inside) / sum(strength),
        "chance": sum(j in nearest[i] or i in nearest[j] for i, j in itertools.combinations(live, 2)) / (n * (n - 1) / 2),
    }


@example(seed=2725, latents=10, size=64)  # equal phis, which a fused multiplication told apart in some blocks
@given(st.integers(0, 2**31), st.integers(10, 24), st.sampled_from([64, 400, 2**26]))
def test_rates_and_curves_are_those_of_the_dense_definition_whatever_the_block(seed: int, latents: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    W_dec_FD = torch.nn.functional.normalize(torch.randn(latents, 6, generator=generator), dim=1)
    f_BF = torch.relu(torch.randn(60, 6, generator=generator) @ W_dec_FD.T - torch.rand(latents, generator=generator))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pairs_module, "BLOCK_BYTES", size)
        result = capture(W_dec_FD, f_BF)
    if result["union"] is None:
        return

    def compare(measured: dict[str, Any], topk: float, q: float, by: str = "strength") -> dict[str, Any]:
        defined = dense(W_dec_FD, f_BF, topk, q, by)
        for name in ("pairs", "row", "union", "mutual", "chance"):
            assert measured[name] == pytest.approx(defined[name], abs=1e-6), (name, topk, q, by)
        return defined

    assert result["strength_weighted"] == pytest.approx(compare(result, 0.1, 1.0)["weighted"], rel=1e-4)
    compare(result["phi"], 0.1, 1.0, "phi")
    assert [entry["topk"] for entry in result["by_topk"]] == list(TOPK_CURVE) == [0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5]
    assert [entry["q"] for entry in result["by_pairs"]] == list(PAIRS_CURVE) == [0.25, 0.5, 1, 2, 4]
    for entry in result["by_topk"]:
        compare(entry, entry["topk"], 1.0)
    for entry in result["by_pairs"]:
        compare(entry, 0.1, entry["q"])


def test_ties_go_to_the_lower_indices() -> None:
    # All pairs equally strong: Q is the n = 4 first of six.
    pairs = cofiring(torch.ones(6, 4)).by_strength
    assert pairs.pair_P2.tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert len(cofiring(torch.ones(6, 4)).by_phi) == 0  # a latent that always fires is correlated with nothing
    assert topk_mask(torch.ones(4, 1), 0.1).nonzero().tolist() == [[0, 1], [1, 0], [2, 0], [3, 0]]


def test_every_latent_knows_its_pairs_and_how_many_are_captured() -> None:
    f_BF = torch.zeros(8, 5)
    for row, (i, j, strength) in enumerate([(0, 1, 4.0), (2, 3, 3.0), (0, 3, 2.0), (1, 3, 1.0)]):
        f_BF[2 * row : 2 * row + 2, [i, j]] = strength**0.5
    # As in the case worked by hand above; latent 4 never fires.
    pairs_F, captured_F = Capture(at_angles(0, 10, 30, 90, 91), cofiring(f_BF), CONFIG).by_latent(5)
    assert pairs_F.tolist() == [2, 2, 1, 3, 0]
    assert captured_F.tolist() == [1, 1, 1, 1, 0]


def test_undefined_rates_are_null_everywhere_and_nothing_is_captured() -> None:
    silent = Capture(at_angles(0, 10, 30), cofiring(torch.zeros(8, 3)), CONFIG)
    result = silent.compute()
    for rates in (result, result["phi"], *result["by_topk"], *result["by_pairs"]):
        assert rates["union"] is None
        assert rates["reason"] == "0 latents fire on 2 rows or more"
    assert result["permuted"] is result["strength_weighted"] is None
    assert [values.tolist() for values in silent.by_latent(3)] == [[0, 0, 0], [0, 0, 0]]


@given(st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), min_size=1, max_size=5), st.integers(0, 40))
def test_the_bound_over_chunks_is_that_of_all_values(chunks: list[list[int]], number: int) -> None:
    everything = sorted(itertools.chain(*chunks), reverse=True)
    found = largest_but(number, (torch.tensor(chunk, dtype=torch.float32) for chunk in chunks))
    assert found == everything[min(number, len(everything) - 1)]
