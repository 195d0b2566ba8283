import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluate.capture import CoActivation, capture, random_tied, topk_mask
from pipeline.experiment import EvaluateConfig
from pipeline.sae import SAE

CONFIG = EvaluateConfig(k_values=(1,), capture_topk=0.1, live_firings=2, joint_firings=2)


def seen(f_BF: torch.Tensor) -> CoActivation:
    coactivation = CoActivation(f_BF.shape[1])
    for rows_BF in f_BF.split(3):
        coactivation.update(rows_BF)
    return coactivation


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
    result = capture(W_dec_FD, seen(f_BF), CONFIG)
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
    result = capture(W_dec_FD, seen(f_BF), CONFIG)
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
    result = capture(at_angles(0, 10, 30, 90), seen(f_BF), CONFIG)
    assert result["union"] is None
    assert result["row"] is None
    assert result["reason"] == reason


@given(st.integers(0, 2**31), st.integers(4, 12), st.floats(0.05, 0.5))
def test_row_is_the_mean_of_union_and_mutual_and_labels_do_not_matter(seed: int, latents: int, topk: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    W_dec_FD = torch.nn.functional.normalize(torch.randn(latents, 5, generator=generator), dim=1)
    f_BF = torch.randn(40, latents, generator=generator).relu()
    config = CONFIG.model_copy(update={"capture_topk": topk})
    result = capture(W_dec_FD, seen(f_BF), config)
    assert result["row"] == pytest.approx(result["column"])
    assert result["row"] == pytest.approx((result["union"] + result["mutual"]) / 2)
    assert result["mutual"] <= result["row"] <= result["union"]
    order = torch.randperm(latents, generator=generator)
    renamed = capture(W_dec_FD[order], seen(f_BF[:, order]), config)
    assert renamed["chance"] == pytest.approx(result["chance"])
    assert renamed["union"] == pytest.approx(result["union"], abs=1e-6)


def test_permuted_labels_capture_what_chance_says() -> None:
    generator = torch.Generator().manual_seed(0)
    W_dec_FD = torch.nn.functional.normalize(torch.randn(40, 6, generator=generator), dim=1)
    # Latents fire with their direction, so the true labels capture more than chance.
    f_BF = torch.relu(torch.randn(4000, 6, generator=generator) @ W_dec_FD.T - 1)
    true = capture(W_dec_FD, seen(f_BF), CONFIG)
    assert true["union"] > 2 * true["chance"]
    permuted = [capture(W_dec_FD[torch.randperm(40, generator=generator)], seen(f_BF), CONFIG) for _ in range(40)]
    mean = sum(result["union"] for result in permuted) / len(permuted)
    assert mean == pytest.approx(true["chance"], abs=0.03)


@given(st.integers(0, 2**31), st.floats(0.5, 15))
def test_the_random_null_has_the_l0_asked_for(seed: int, l0: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    x_BD = torch.randn(200, 8, generator=generator) + 1
    W_dec_FD = torch.nn.functional.normalize(torch.randn(16, 8, generator=generator), dim=1)
    sae = SAE(W_enc_DF=W_dec_FD.T, b_enc_F=torch.zeros(16), W_dec_FD=W_dec_FD, b_dec_D=torch.ones(8))
    null = random_tied(sae, x_BD, l0)
    torch.testing.assert_close(null.W_dec_FD.norm(dim=1), torch.ones(16))
    measured = float((null.encode(x_BD) > 0).sum() / len(x_BD))
    assert measured == pytest.approx(l0, abs=0.02)
    assert not torch.allclose(null.W_dec_FD, W_dec_FD)
