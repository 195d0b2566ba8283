"""Statistics of paired seeds: intervals, Holm's correction, and how many seeds a claim would need.

Defined and argued in docs/method.md, "Differences between arms". The unit is the seed: two arms of one seed share their
initial weights and every batch, so their difference is one observation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
POWER = 0.8
BOOTSTRAP_FROM = 10
"""Pairs from which a bootstrap interval is given too: n pairs have (2n-1)!/(n!(n-1)!) resamples, 10 for three."""
BOOTSTRAP_SEED = 0
MOST_SEEDS = 1000
"""`seeds_needed` looks no further, because no study has more."""


@dataclass(frozen=True, kw_only=True)
class Paired:
    """The mean of paired differences with 95 % intervals; None where n pairs do not suffice."""

    n: int
    mean: float
    sd: float | None
    """Standard deviation of the differences, with n - 1."""
    low: float | None
    high: float | None
    """Student's interval: exact for any n >= 2 if the differences are normal."""
    p: float | None
    """Two-sided, of the same t test. None also when the differences do not vary: there is no spread to test against."""
    bootstrap_low: float | None
    bootstrap_high: float | None
    """Bias-corrected and accelerated bootstrap over the pairs, from BOOTSTRAP_FROM pairs on."""


def paired(differences: Sequence[float]) -> Paired:
    """Mean, interval and test of paired differences, at least one."""
    values = np.asarray(differences, dtype=np.float64)
    mean, n = float(values.mean()), len(values)
    sd = float(values.std(ddof=1)) if n > 1 else None
    known = Paired(n=n, mean=mean, sd=sd, low=None, high=None, p=None, bootstrap_low=None, bootstrap_high=None)
    if sd is None:
        return known
    if sd <= 1e-12 * abs(values).max():  # equal except for rounding, which a t test would call certain
        return replace(known, sd=0.0, low=mean, high=mean)
    error = sd / n**0.5
    low, high = cast("tuple[float, float]", stats.t.interval(CONFIDENCE, n - 1, loc=mean, scale=error))  # scipy is untyped
    known = replace(known, low=float(low), high=float(high), p=float(2 * stats.t.sf(abs(mean) / error, n - 1)))
    if n < BOOTSTRAP_FROM:
        return known
    rng = np.random.default_rng(BOOTSTRAP_SEED)
    resampled = stats.bootstrap((values,), np.mean, confidence_level=CONFIDENCE, rng=rng)
    low, high = cast("tuple[float, float]", resampled.confidence_interval)
    return replace(known, bootstrap_low=float(low), bootstrap_high=float(high))


def over_pairs(values: Sequence[float]) -> Paired:
    """The mean over all pairs of seeds, with an interval; `values` are each seed's mean over its pairs with the others.

    The pairs share seeds and are not independent, so the interval is the jackknife's: Student's on the pseudo-values of
    leaving out one seed (Arvesen 1969, for U-statistics). Three seeds at least; of two there is one pair and no interval.
    """
    n, mean = len(values), sum(values) / len(values)
    if n < 3:
        return replace(paired([mean]), n=n)
    # Without seed i the mean over the other pairs is (n mean - 2 value_i) / (n - 2).
    return paired([n * mean - (n - 1) * (n * mean - 2 * value) / (n - 2) for value in values])


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected by Holm (1979): rejecting those below alpha errs with a probability of at most alpha."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(np.arange(len(p), 0, -1) * p[order]).clip(max=1)
    return corrected.tolist()


def power(effect: float, n: int, alpha: float) -> float:
    """Probability that a two-sided paired t test of n pairs finds a true mean of `effect` standard deviations."""
    # The lower tail is the upper tail of the negated shift: scipy's nct.cdf is nan for large shifts.
    critical, shift = stats.t.isf(alpha / 2, n - 1), effect * n**0.5
    return float(stats.nct.sf(critical, n - 1, shift) + stats.nct.sf(critical, n - 1, -shift))


def seeds_needed(difference: float, sd: float, alpha: float) -> int | None:
    """The fewest pairs that find a true `difference` at POWER, if their standard deviation is `sd`.

    None when the difference is 0 or MOST_SEEDS pairs do not suffice.
    """
    if difference == 0:
        return None
    if sd == 0:
        return 2
    effect = abs(difference) / sd
    if power(effect, MOST_SEEDS, alpha) < POWER:
        return None
    low, high = 1, MOST_SEEDS  # `high` pairs suffice, `low` do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power(effect, middle, alpha) >= POWER else (middle, high)
    return high
