"""Intervals, corrections and power: against closed forms, and against what repeated sampling does."""

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipeline.report.statistics import BOOTSTRAP_FROM, MOST_SEEDS, POWER, holm, over_pairs, paired, power, seeds_needed


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
    assert found.bootstrap_low is None


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
    assert found.low == found.high == pytest.approx(difference)


def test_rounding_is_no_spread() -> None:
    assert paired([0.1, 0.1 + 1e-17, 0.3 - 0.2]).p is None


def test_a_bootstrap_interval_needs_enough_pairs_to_resample() -> None:
    values = np.random.default_rng(1).exponential(size=BOOTSTRAP_FROM + 20)
    assert paired(values[: BOOTSTRAP_FROM - 1]).bootstrap_low is None
    found = paired(values)
    assert found.bootstrap_low is not None
    assert found.bootstrap_high is not None
    assert found.bootstrap_low < found.mean < found.bootstrap_high
    # Exponential differences lean to the right, which Student's symmetric interval does not see.
    assert found.bootstrap_high - found.mean > found.mean - found.bootstrap_low
    assert paired(values) == found


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


def test_power_is_what_simulated_tests_find() -> None:
    samples = np.random.default_rng(3).normal(0.8, 1, size=(4000, 6))
    found = np.mean(stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05)
    assert power(0.8, 6, 0.05) == pytest.approx(found, abs=0.03)
    assert power(0, 6, 0.05) == pytest.approx(0.05)


def test_seeds_needed_agrees_with_what_others_compute() -> None:
    # statsmodels' TTestPower().solve_power(0.5 and 0.8, alpha=.05, power=.8): 33.37 and 14.30 pairs.
    assert seeds_needed(0.5, 1, 0.05) == 34
    assert seeds_needed(-0.08, 0.1, 0.05) == 15
    assert seeds_needed(0.0, 1, 0.05) is None
    assert seeds_needed(1e-6, 1, 0.05) is None
    assert seeds_needed(0.01, 0.0, 0.05) == 2


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.sampled_from([0.05, 0.05 / 10]))
def test_seeds_needed_is_the_first_number_that_does(difference: float, sd: float, alpha: float) -> None:
    needed = seeds_needed(difference, sd, alpha)
    if needed is None:
        assert power(difference / sd, MOST_SEEDS, alpha) < POWER
        return
    assert power(difference / sd, needed, alpha) >= POWER
    assert needed == 2 or power(difference / sd, needed - 1, alpha) < POWER
