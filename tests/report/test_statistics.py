"""Intervals, corrections and power: against closed forms, and against what repeated sampling does."""

import math
from collections.abc import Sequence
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipeline.report.statistics import Paired, holm, least_found, over_pairs, paired, pooled


def test_three_pairs_by_hand() -> None:
    found = paired([0.01, 0.02, 0.06])
    # mean .03, sd sqrt((.02^2 + .01^2 + .03^2) / 2); the 97.5 % point of Student's t with 2 degrees of freedom is 4.302653
    sd = math.sqrt(0.0007)
    assert found.n == 3
    assert found.mean == pytest.approx(0.03)
    assert found.sd == pytest.approx(sd)
    assert found.high == pytest.approx(0.03 + 4.3026527 * sd / math.sqrt(3))
    assert found.low == pytest.approx(0.03 - 4.3026527 * sd / math.sqrt(3))
    # With 2 degrees of freedom the distribution function is elementary: P(|T| > t) = 1 - t / sqrt(2 + t^2).
    t = 0.03 / (sd / math.sqrt(3))
    assert found.p == pytest.approx(1 - t / math.sqrt(2 + t**2))


def test_pairs_of_seeds_by_hand() -> None:
    pairs = {(0, 1): 0.2, (0, 2): 0.5, (1, 2): 0.8}
    of_seed = [sum(value for pair, value in pairs.items() if seed in pair) / 2 for seed in range(3)]
    found = over_pairs(of_seed)
    left_out = [pairs[1, 2], pairs[0, 2], pairs[0, 1]]
    pseudo = [3 * 0.5 - 2 * value for value in left_out]
    assert (found.mean, found.n) == (pytest.approx(0.5), 3)
    assert (found.low, found.high) == tuple(pytest.approx(end) for end in stats.t.interval(0.95, 2, 0.5, stats.sem(pseudo)))
    two = over_pairs([0.4, 0.4])
    assert (two.n, two.mean, two.low) == (2, 0.4, None)


@pytest.mark.parametrize("n", [3, 5, 10])
@pytest.mark.parametrize("shared", [0.0, 0.5, 1.0])
def test_the_interval_over_pairs_holds_the_truth(n: int, shared: float) -> None:
    """Whatever part of a pair's value belongs to its seeds. Without shared parts the interval is wider than it need be."""
    generator, held = np.random.default_rng(n), 0
    for _ in range(600):
        own_S = generator.normal(size=n) * shared
        noise_SS = np.triu(generator.normal(size=(n, n)), 1) * (1 - shared)
        value_SS = own_S[:, None] + own_S[None] + noise_SS + noise_SS.T
        found = over_pairs([(value_SS[seed].sum() - value_SS[seed, seed]) / (n - 1) for seed in range(n)])
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 0 <= found.high
    assert held / 600 > 0.93


def test_one_pair_tells_nothing_but_its_difference() -> None:
    found = paired([0.25])
    assert (found.n, found.mean, found.sd, found.low, found.p) == (1, 0.25, None, None, None)


@pytest.mark.parametrize("difference", [0.0, 0.1, 3.0])
def test_differences_that_do_not_vary_are_not_called_certain(difference: float) -> None:
    found = paired([difference, difference, difference])
    assert found.p is None
    assert (found.low, found.high) == (None, None)
    assert found.mean == pytest.approx(difference)


def test_rounding_is_no_spread() -> None:
    assert paired([0.1, 0.1 + 1e-17, 0.3 - 0.2]).p is None


@pytest.mark.parametrize("n", [2, 3, 5])
def test_intervals_hold_the_truth_as_often_as_they_say(n: int) -> None:
    samples = np.random.default_rng(n).normal(0.4, 1.3, size=(800, n))
    found = [paired(sample) for sample in samples]
    covered = np.mean([one.low <= 0.4 <= one.high for one in found if one.low is not None and one.high is not None])
    # Four standard errors of a share of 800 at .95 are .031. A percentile bootstrap of 3 covers at most .75.
    assert covered == pytest.approx(0.95, abs=0.031)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.randoms())
def test_holm_is_monotone_and_between_none_and_bonferroni(p_values: list[float], random: Random) -> None:
    corrected = holm(p_values)
    for p, one in zip(p_values, corrected, strict=True):
        assert p <= one <= min(1, len(p_values) * p)
    by_p = sorted(zip(p_values, corrected, strict=True))
    assert [one for _, one in by_p] == sorted(corrected)
    order = list(range(len(p_values)))
    random.shuffle(order)
    assert holm([p_values[index] for index in order]) == pytest.approx([corrected[index] for index in order])


def test_holm_keeps_its_promise_when_nothing_differs() -> None:
    rng = np.random.default_rng(7)
    families = stats.ttest_1samp(rng.normal(size=(2000, 10, 3)), 0, axis=2).pvalue
    wrong = np.mean([min(holm(family)) < 0.05 for family in families])
    assert wrong == pytest.approx(0.05, abs=0.0195)
    assert np.mean([min(family) < 0.05 for family in families]) > 0.35


def test_the_smallest_difference_found_is_found_in_four_studies_of_five() -> None:
    sd, seeds = 0.02, 5
    least = least_found(sd, seeds, seeds - 1, 0.05)
    samples = np.random.default_rng(3).normal(least, sd, size=(4000, seeds))
    assert np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.025)
    assert least_found(sd, seeds, 40, 0.05) < least, "more degrees of freedom find less"
    assert least_found(sd, seeds, seeds - 1, 0.05 / 20) > least, "more comparisons less"


def test_pooled_is_the_analysis_of_variance_with_seeds_as_blocks() -> None:
    generator = np.random.default_rng(4)
    y_AS = generator.normal(size=(5, 4)) + generator.normal(size=4)
    found = pooled((y_AS[1:] - y_AS[0]).tolist())
    arm, seed = (np.repeat(np.arange(5), 4), np.tile(np.arange(4), 5))
    design = np.stack([*(arm == one for one in range(1, 5)), *(seed == one for one in range(4))], axis=1).astype(float)
    fitted, _, rank, _ = np.linalg.lstsq(design, y_AS.ravel(), rcond=None)
    left = y_AS.ravel() - design @ fitted
    mean_square = float(left @ left) / (20 - rank)
    assert found.pooled
    for one, effect in zip(found.arms, fitted[:4], strict=True):
        assert one.df == 20 - rank == 12
        assert one.mean == pytest.approx(effect)
        assert one.sd is not None
        assert one.sd >= (2 * mean_square) ** 0.5 * (1 - 1e-12), "an arm that varies more keeps its own"
    assert min(one.sd or 0 for one in found.arms) == pytest.approx((2 * mean_square) ** 0.5)


def test_an_effect_of_the_seeds_changes_nothing() -> None:
    generator = np.random.default_rng(5)
    y_AS = generator.normal(size=(6, 3))
    one, other = (
        pooled(((y_AS + shift)[1:] - (y_AS + shift)[0]).tolist()) for shift in (0.0, generator.normal(size=3) * 50)
    )
    assert [arm.p for arm in one.arms] == pytest.approx([arm.p for arm in other.arms])


def test_arms_that_never_differ_have_no_variance() -> None:
    found = pooled([[0.0, 0.0, 0.0]] * 4)
    assert [one.p for one in found.arms] == [None] * 4
    assert found.ratio == 1.0


def page(
    generator: np.random.Generator, seeds: int, families: int, sds: Sequence[float], effect: float = 0.0
) -> list[float]:
    """Corrected p values of a page: in each family arms beside one reference; the first arm of the first differs."""
    found: list[Paired] = []
    for family in range(families):
        y_AS = generator.normal(size=(len(sds), seeds)) * np.array(sds)[:, None] + 2 * generator.normal(size=seeds)
        y_AS[1] += effect * 2**0.5 * (family == 0)  # in standard deviations of a difference
        found += pooled((y_AS[1:] - y_AS[0]).tolist()).arms
    return holm([one.p for one in found if one.p is not None])


@pytest.mark.parametrize(("seeds", "families"), [(3, 4), (3, 12), (5, 12), (20, 4)])
def test_a_page_tells_of_what_is_not_there_at_most_once_in_twenty(seeds: int, families: int) -> None:
    """Ten arms, four metrics, one layer or three. benchmarks/verdicts.py has more cells and more studies."""
    generator = np.random.default_rng(6)
    wrong = sum(min(page(generator, seeds, families, [1.0] * 11)) < 0.05 for _ in range(150))
    assert wrong / 150 <= 0.05 + 0.036  # two standard errors


def test_a_page_finds_four_standard_deviations_with_three_seeds() -> None:
    generator = np.random.default_rng(8)
    told = sum(page(generator, 3, 4, [1.0] * 11, effect=4.0)[0] < 0.05 for _ in range(100))
    assert told >= 85


def test_one_arm_that_varies_much_more_is_seen() -> None:
    generator, seen = np.random.default_rng(9), 0
    for _ in range(100):
        y_AS = generator.normal(size=(11, 5)) * np.array([1, 5, *[1] * 9])[:, None]
        seen += not pooled((y_AS[1:] - y_AS[0]).tolist()).pooled
    assert seen >= 80
