"""Recovery of true features, on dictionaries whose every number is known by hand."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluate.recovery import Recovery
from pipeline.models.model_section import SyntheticModel
from pipeline.models.synthetic import NO_PARENT, GroundTruth
from pipeline.sae.sae import SAE
from pipeline.study.sections import EvaluateConfig

CONFIG = EvaluateConfig(k_values=(1,), capture_topk=0.1, live_firings=2)
PARENT, CHILD, FIRST, SECOND, FREE_A, FREE_B = range(6)
SIMILARITY = 0.4
ROWS = 12


def truth_of(direction_TD: torch.Tensor, parent: list[int], pairs: list[list[int]]) -> GroundTruth:
    features = len(direction_TD)
    return GroundTruth(
        direction_TD=direction_TD,
        probability_T=torch.full((features,), 0.1),
        magnitude_std_T=torch.zeros(features),
        parent_T=torch.tensor(parent),
        pair_P2=torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2),
        correlation_P=torch.full((len(pairs),), 0.8),
    )


def planted() -> GroundTruth:
    """A parent and its child, a correlated pair, two free features; relatives have a cosine of 0.4, the others of 0."""
    direction_TD = torch.eye(6, 8)
    for feature, like in ((CHILD, PARENT), (SECOND, FIRST)):
        direction_TD[feature] *= math.sqrt(1 - SIMILARITY**2)
        direction_TD[feature, like] = SIMILARITY
    return truth_of(direction_TD, [NO_PARENT, PARENT, *[NO_PARENT] * 4], [[FIRST, SECOND]])


def true_rows() -> torch.Tensor:
    """The parent fires on rows 0-5, its child on 0-1; the pair on 6-9 and 8-11; the free ones on 0-3 and 4-7."""
    f_BT = torch.zeros(ROWS, 6)
    for feature, first, last in (
        (PARENT, 0, 5), (CHILD, 0, 1), (FIRST, 6, 9), (SECOND, 8, 11), (FREE_A, 0, 3), (FREE_B, 4, 7),
    ):  # fmt: skip
        f_BT[first : last + 1, feature] = 1.0
    return f_BT


def measured(W_dec_FD: torch.Tensor, f_BF: torch.Tensor, truth: GroundTruth, true_BT: torch.Tensor) -> dict[str, Any]:
    nothing_F, nothing_D = torch.zeros(len(W_dec_FD)), torch.zeros(W_dec_FD.shape[1])
    recovery = Recovery(SAE(W_enc_DF=W_dec_FD.T, b_enc_F=nothing_F, W_dec_FD=W_dec_FD, b_dec_D=nothing_D), truth)
    for rows_BF, rows_BT in zip(f_BF.split(5), true_BT.split(5), strict=True):
        recovery.update(rows_BF, rows_BT)
    result = recovery.compute(CONFIG)
    json.dumps(result, allow_nan=False)
    return result


def recovered(result: dict[str, Any], field: str = "recovered") -> dict[str, Any]:
    return {name: group[field] for name, group in result["features"].items()}


def bisector(a_D: torch.Tensor, b_D: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.normalize(a_D + b_D, dim=0)


BETWEEN = math.sqrt((1 + SIMILARITY) / 2)
"""Cosine of two relatives to the direction halfway between them: more than 0.8."""


def test_a_perfect_sae() -> None:
    truth, true_BT = planted(), true_rows()
    result = measured(truth.direction_TD, true_BT, truth, true_BT)
    assert result["rows"] == ROWS
    everything = dict.fromkeys(("all", "free", "parents", "children", "correlated"), 1.0)
    assert recovered(result) == recovered(result, "one_to_one") == recovered(result, "f1") == everything
    assert recovered(result, "max_cosine") == pytest.approx(everything)
    assert recovered(result, "features") == {"all": 6, "free": 2, "parents": 1, "children": 1, "correlated": 2}
    assert result["absorption"] == {"planted": 1, "matched": 1, "with_child": 0.0, "alone": 0.0, "reason": None}
    # With k = 1, P has (parent, child), (first, second), and for the free ones, similar to none, the lowest index.
    assert result["pairs"] == {
        "correlated": {"planted": 1, "matched": 1, "captured": 1.0, "reason": None},
        "parent_child": {"planted": 1, "matched": 1, "captured": 1.0, "reason": None},
        "all": {"planted": 2, "matched": 2, "captured": 1.0, "reason": None},
        "chance": pytest.approx(4 / 15),
    }
    assert result["false_capture"] == {"pairs": 2, "rate": 0.0, "reason": None}


def test_merged_features_are_one_latent_and_no_pair() -> None:
    truth, true_BT = planted(), true_rows()
    merged_D = bisector(truth.direction_TD[FIRST], truth.direction_TD[SECOND])
    W_dec_FD = torch.cat([truth.direction_TD[[PARENT, CHILD, FREE_A, FREE_B]], merged_D[None]])
    either_B1 = true_BT[:, [FIRST, SECOND]].amax(dim=1, keepdim=True)
    result = measured(W_dec_FD, torch.cat([true_BT[:, [PARENT, CHILD, FREE_A, FREE_B]], either_B1], dim=1), truth, true_BT)
    assert recovered(result)["all"] == recovered(result)["correlated"] == 1.0
    assert recovered(result, "one_to_one")["all"] == pytest.approx(5 / 6)
    assert recovered(result, "one_to_one")["correlated"] == pytest.approx(1 / 2)
    assert recovered(result, "max_cosine")["correlated"] == pytest.approx(BETWEEN)
    # The latent fires on 6 rows, each of the two features on 4 of them.
    assert recovered(result, "f1")["correlated"] == pytest.approx(2 * 4 / (4 + 6))
    assert result["pairs"]["correlated"] == {
        "planted": 1,
        "matched": 0,
        "captured": None,
        "reason": "of 1 planted pairs none has two latents of its own",
    }
    assert result["false_capture"] == {"pairs": 1, "rate": 0.0, "reason": None}


def test_an_absorbed_parent_is_silent_where_its_child_fires_and_only_there() -> None:
    truth, true_BT = planted(), true_rows()
    W_dec_FD, f_BF = truth.direction_TD.clone(), true_BT.clone()
    W_dec_FD[CHILD] = bisector(truth.direction_TD[PARENT], truth.direction_TD[CHILD])
    f_BF[true_BT[:, CHILD] > 0, PARENT] = 0
    result = measured(W_dec_FD, f_BF, truth, true_BT)
    assert recovered(result, "one_to_one")["all"] == 1.0
    assert result["absorption"] == {"planted": 1, "matched": 1, "with_child": 1.0, "alone": 0.0, "reason": None}
    # The parent's latent fires on 4 of the parent's 6 rows, the child's on its 2.
    assert recovered(result, "f1")["parents"] == pytest.approx(2 * 4 / (6 + 4))
    assert recovered(result, "f1")["children"] == 1.0


def test_a_parent_missed_anyhow_is_no_absorption() -> None:
    truth, true_BT = planted(), true_rows()
    f_BF = true_BT.clone()
    f_BF[[0, 2, 3], PARENT] = 0
    absorption = measured(truth.direction_TD, f_BF, truth, true_BT)["absorption"]
    assert absorption["with_child"] == pytest.approx(1 / 2)
    assert absorption["alone"] == pytest.approx(2 / 4)


def test_rows_on_which_the_childs_latent_is_silent_are_no_absorption() -> None:
    truth, true_BT = planted(), true_rows()
    f_BF = true_BT.clone()
    f_BF[0, [PARENT, CHILD]] = 0
    # The child's latent must be live on two rows: it also fires, wrongly, without its feature.
    f_BF[11, CHILD] = 1.0
    assert measured(truth.direction_TD, f_BF, truth, true_BT)["absorption"]["with_child"] == 0.0


def test_a_split_feature_is_found_by_half() -> None:
    truth, true_BT = planted(), true_rows()
    near_D = torch.nn.functional.normalize(truth.direction_TD[FREE_A] + 0.1 * torch.eye(8)[7], dim=0)
    f_BF = torch.cat([true_BT, torch.zeros(ROWS, 1)], dim=1)
    f_BF[2:4, FREE_A], f_BF[2:4, 6] = 0.0, 1.0
    result = measured(torch.cat([truth.direction_TD, near_D[None]]), f_BF, truth, true_BT)
    assert recovered(result, "one_to_one")["all"] == 1.0
    # Of the free feature's 4 rows its latent has 2; the other free feature is perfect.
    assert recovered(result, "f1")["free"] == pytest.approx((2 * 2 / (4 + 2) + 1) / 2)
    # P holds the two halves, but they never fire together: the penalty does not push them.
    assert result["false_capture"]["rate"] == 0.0


def test_one_to_one_finds_the_assignment_that_recovers_most() -> None:
    def at(*degrees: float) -> torch.Tensor:
        radians = torch.tensor(degrees).deg2rad()
        return torch.stack([radians.cos(), radians.sin()], dim=1)

    # The latent at 15 degrees is the best one of both features, but only the first feature has another.
    truth, true_BT = truth_of(at(0, 40), [NO_PARENT] * 2, []), torch.ones(4, 2)
    features = measured(at(15, -30), torch.ones(4, 2), truth, true_BT)["features"]["all"]
    assert (features["recovered"], features["one_to_one"]) == (1.0, 1.0)
    features = measured(at(15, -60), torch.ones(4, 2), truth, true_BT)["features"]["all"]
    assert (features["recovered"], features["one_to_one"]) == (1.0, 0.5)


def test_a_latent_that_hardly_fires_recovers_nothing_and_is_in_no_pair() -> None:
    truth, true_BT = planted(), true_rows()
    f_BF = true_BT.clone()
    f_BF[1:, CHILD] = 0
    result = measured(truth.direction_TD, f_BF, truth, true_BT)
    assert recovered(result)["children"] == recovered(result, "one_to_one")["children"] == 0.0
    assert recovered(result, "max_cosine")["children"] == pytest.approx(1.0)
    assert (result["absorption"]["matched"], result["pairs"]["parent_child"]["matched"]) == (0, 0)


def test_opposite_directions_are_no_match() -> None:
    truth, true_BT = planted(), true_rows()
    assert recovered(measured(-truth.direction_TD, true_BT, truth, true_BT))["all"] == 0.0


def test_nothing_matched_is_none_with_a_reason() -> None:
    truth, true_BT = planted(), true_rows()
    stranger_FD = torch.eye(8)[6:]
    for f_BF in (torch.ones(ROWS, 2), torch.zeros(ROWS, 2)):
        result = measured(stranger_FD, f_BF, truth, true_BT)
        assert (
            recovered(result)["all"] == recovered(result, "one_to_one")["all"] == recovered(result, "max_cosine")["all"] == 0
        )
        assert result["features"]["all"]["f1"] is None
        assert result["features"]["all"]["reason"] == "no latent matches any of 6 features"
        assert result["absorption"]["with_child"] is result["absorption"]["alone"] is None
        assert "none has two latents of its own" in result["absorption"]["reason"]
        assert result["pairs"]["correlated"]["captured"] is result["pairs"]["parent_child"]["captured"] is None
        assert result["false_capture"]["rate"] is None
        assert result["false_capture"]["reason"] == "no planted pair has two latents of its own"


def test_what_was_not_planted_has_no_rate() -> None:
    truth = truth_of(torch.eye(3), [NO_PARENT] * 3, [])
    result = measured(torch.eye(3), torch.eye(3).repeat(4, 1), truth, torch.eye(3).repeat(4, 1))
    assert recovered(result) == {"all": 1.0, "free": 1.0, "parents": None, "children": None, "correlated": None}
    assert result["absorption"]["planted"] == result["pairs"]["correlated"]["planted"] == 0


def test_pairs_that_the_penalty_pushes_most_may_be_pairs_of_chance() -> None:
    truth, true_BT = planted(), true_rows()
    # Free A's latent leans towards the parent's, as much as a relative's would, and both fire strongly.
    W_dec_FD, f_BF = truth.direction_TD.clone(), true_BT.clone()
    W_dec_FD[FREE_A] = math.sqrt(1 - 0.3**2) * truth.direction_TD[FREE_A] + 0.3 * truth.direction_TD[PARENT]
    f_BF[:, [PARENT, FREE_A]] *= 10
    result = measured(W_dec_FD, f_BF, truth, true_BT)
    assert result["pairs"]["parent_child"]["captured"] == result["pairs"]["correlated"]["captured"] == 1.0
    # By cosine times product: 0.3 x 400 against 0.4 x 20 for parent and child, and 0.4 x 2 for the correlated pair.
    assert result["false_capture"] == {"pairs": 2, "rate": 0.5, "reason": None}


def test_pairs_that_the_mask_misses_are_not_captured() -> None:
    truth, true_BT = planted(), true_rows()
    # Each of the pair has a latent more similar to it than its partner's is.
    closer_KD = torch.stack([bisector(truth.direction_TD[feature], axis_D) for feature, axis_D in
                             ((FIRST, torch.eye(8)[6]), (SECOND, torch.eye(8)[7]))])  # fmt: skip
    f_BF = torch.cat([true_BT, true_BT[:, [FIRST, SECOND]]], dim=1)
    pairs = measured(torch.cat([truth.direction_TD, closer_KD]), f_BF, truth, true_BT)["pairs"]
    assert (pairs["correlated"]["matched"], pairs["correlated"]["captured"]) == (1, 0.0)
    assert pairs["parent_child"]["captured"] == 1.0
    assert (pairs["all"]["matched"], pairs["all"]["captured"]) == (2, 0.5)


@given(seed=st.integers(0, 2**31), latents=st.integers(2, 50), noise=st.floats(0, 0.3))
def test_the_order_of_the_latents_does_not_matter(seed: int, latents: int, noise: float) -> None:
    truth = GroundTruth.plant(
        SyntheticModel(source="synthetic", d_in=12, features=30, parents=3, children=2, correlated_pairs=4, seed=seed)
    )
    generator = torch.Generator().manual_seed(seed)
    near_FD = truth.direction_TD[torch.randint(30, (latents,), generator=generator)]
    W_dec_FD = torch.nn.functional.normalize(near_FD + noise * torch.randn(latents, 12, generator=generator), dim=1)
    # Small integers, so that sums are exact in any order.
    f_BF = torch.randint(-3, 4, (40, latents), generator=generator).clamp_min(0).float()
    true_BT = torch.rand(40, 30, generator=generator) - 0.8
    order = torch.randperm(latents, generator=generator)
    result = measured(W_dec_FD, f_BF, truth, true_BT.clamp_min(0))
    features = result["features"]["all"]
    assert 0 <= features["one_to_one"] <= features["recovered"] <= 1
    assert recovered(result, "one_to_one") == recovered(
        measured(W_dec_FD[order], f_BF[:, order], truth, true_BT.clamp_min(0)), "one_to_one"
    )
