"""How far a difference in probing depends on the test texts: by hand, and against studies drawn again and again."""

import math

import numpy as np
import pytest
import torch
from small_results import results_of, row

from pipeline.evaluate.probe_texts import packed
from pipeline.report.frontier import Along, Frontier, Single
from pipeline.report.results import Row
from pipeline.report.statistics import Paired, paired, with_variance
from pipeline.report.text_noise import ProbeTexts, unpacked

TEXTS = 80


def sae(arm: str, seed: int, added: dict[str, list[float]], l0: float = 20.0) -> Row:
    texts = {name: dict.fromkeys(("1", "all"), packed(torch.tensor(values))) for name, values in added.items()}
    score = sum(sum(values) for values in added.values()) / len(added)
    probing = {"1": score, "all": 0.9}
    by_task = dict.fromkeys(("easy", "hard"), probing)
    key = f"{arm}-{seed}-{l0:g}"
    return row(arm, seed, sae=key, l0=l0, fvu=0.1, sparse_probing=probing, sparse_probing_by_task=by_task, probe_texts=texts)


def test_numbers_come_back_from_text() -> None:
    added_S = torch.tensor([0.0, 0.25, 1 / 3])
    assert unpacked(packed(added_S)).tolist() == added_S.tolist()


def test_two_data_sets_by_hand() -> None:
    one = {"easy": [0.1, 0.3], "hard": [0.2, 0.2, 0.5]}
    other = {"easy": [0.1, 0.1], "hard": [0.0, 0.2, 0.2]}
    pairs = [Single(sae("full", seed, one), sae("baseline", seed, other)) for seed in (0, 1)]
    # Differences 0, .2 and .2, 0, .3, each halved; both seeds agree, so that all of it is the texts'.
    easy = 2 / 1 * (0.05**2 + 0.05**2)
    mean = 0.25 / 3
    hard = 3 / 2 * ((0.1 - mean) ** 2 + mean**2 + (0.15 - mean) ** 2)
    assert ProbeTexts().variance(pairs, "1") == pytest.approx(easy + hard)
    assert ProbeTexts().variance(pairs[:1], "1") is None
    assert ProbeTexts().variance([pairs[0], Single(row("full", 1), row("baseline", 1))], "1") is None


def test_along_a_frontier_texts_are_weighted_as_their_saes() -> None:
    levels = [10.0, 20.0, 40.0]
    ours = [sae("full", 0, {"easy": [level, 0.0]}, l0=level) for level in levels]
    theirs = [sae("baseline", 0, {"easy": [1.0, 0.0]}, l0=level) for level in levels]
    pair = Along(Frontier.of(ours), Frontier.of(theirs), (10.0, math.sqrt(200), 40.0))
    weights = {(each.arm, each.l0): weight for each, weight in pair.weights}
    assert weights["full", 10.0] == pytest.approx(1.5 / 3)
    assert weights["full", 20.0] == pytest.approx(0.5 / 3)
    assert weights["baseline", 40.0] == pytest.approx(-1 / 3)
    assert sum(weights.values()) == pytest.approx(0)


def drawn(rng: np.random.Generator, seeds: int) -> list[Single]:
    """A study without a difference, whose texts matter as much as three seeds, and in every SAE somewhat otherwise."""
    text_T = rng.normal(size=TEXTS) / math.sqrt(TEXTS)
    pairs: list[Single] = []
    for seed in range(seeds):
        own_T = (rng.normal(size=TEXTS) + rng.normal() / math.sqrt(TEXTS) * math.sqrt(3)) / math.sqrt(TEXTS)
        pairs.append(
            Single(sae("full", seed, {"easy": (text_T + own_T).tolist()}), sae("baseline", seed, {"easy": [0.0] * TEXTS}))
        )
    return pairs


@pytest.mark.parametrize("seeds", [3, 10])
def test_an_interval_without_the_texts_is_too_narrow_and_with_them_it_is_not(seeds: int) -> None:
    rng, held, held_by_seeds, studies = np.random.default_rng(seeds), 0, 0, 600
    for _ in range(studies):
        pairs = drawn(rng, seeds)
        found = paired([float(unpacked((pair.ours.probe_texts or {})["easy"]["1"]).sum()) for pair in pairs])
        variance = ProbeTexts().variance(pairs, "1")
        assert variance is not None
        wide = with_variance(found, variance)
        held += (wide.low or 0) <= 0 <= (wide.high or 0)
        held_by_seeds += (found.low or 0) <= 0 <= (found.high or 0)
    assert held / studies >= 0.94
    assert held_by_seeds / studies < (0.93 if seeds == 3 else 0.75)


def test_a_difference_in_probing_carries_the_error_of_its_texts() -> None:
    rng = np.random.default_rng(0)
    rows = [each for pair in drawn(rng, 10) for each in (pair.ours, pair.theirs)]
    of_texts, bare = (
        next(one for one in results_of(some).differences if one.metric == "sparse_probing_1" and one.arm == "baseline")
        for some in (rows, [each.model_copy(update={"probe_texts": None}) for each in rows])
    )
    assert bare.text_error is None
    assert of_texts.text_error is not None
    assert of_texts.text_error > 0
    assert of_texts.difference == bare.difference
    assert (of_texts.sd or 0) ** 2 == pytest.approx((bare.sd or 0) ** 2 + 10 * of_texts.text_error**2)
    assert (of_texts.high or 0) - (of_texts.low or 0) != (bare.high or 0) - (bare.low or 0)
    assert next(one for one in results_of(rows).differences if one.metric == "fvu").text_error is None


def test_nothing_is_added_where_seeds_do_not_vary() -> None:
    still = Paired(n=3, mean=0.1, sd=0.0, df=None, low=None, high=None, p=None)
    assert with_variance(still, 0.1) == still
