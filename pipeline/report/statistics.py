"""Statistics of paired seeds: intervals, variance pooled over arms, Holm's correction, and the smallest difference found.

Defined and argued in docs/method.md, "Differences between arms". The unit is the seed: two arms of one seed share their
initial weights and every batch, so their difference is one observation.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
from scipy import stats

CONFIDENCE = 0.95
POWER = 0.8
FEWEST_POOLED = 3
"""Arms beside their reference, and seeds, from which their variance is pooled. Simulated from there on (docs/method.md)."""
UNEQUAL = 0.1
"""Level of the test whether one arm varies more than the others, in which case nothing is pooled."""
UNEVEN = 0.05
"""Level of the test whether seeds stray further to one side."""
FEWEST_SKEWED = 8
"""Values from which on that test exists (scipy)."""


@dataclass(frozen=True, kw_only=True)
class Paired:
    """The mean of paired differences with 95 % intervals; None where n pairs do not suffice."""

    n: int
    mean: float
    sd: float | None
    """Standard deviation of a difference between seeds: of the observed ones with n - 1, or pooled."""
    df: float | None
    """Degrees of freedom of its square."""
    low: float | None
    high: float | None
    """Student's interval: exact if the differences are normal."""
    p: float | None
    """Two-sided, of the same t test. None also when the differences do not vary: there is no spread to test against."""


def paired(differences: Sequence[float]) -> Paired:
    """Mean, interval and test of paired differences, at least one."""
    values = np.asarray(differences, dtype=np.float64)
    mean, n = float(values.mean()), len(values)
    sd = float(values.std(ddof=1)) if n > 1 else None
    if sd is None or sd <= 1e-12 * abs(values).max():  # equal except for rounding, which a t test would call certain
        return Paired(n=n, mean=mean, sd=None if sd is None else 0.0, df=None, low=None, high=None, p=None)
    return _student(n, mean, sd, n - 1)


def _student(n: int, mean: float, sd: float, df: float) -> Paired:
    error = sd / n**0.5
    low, high = cast("tuple[float, float]", stats.t.interval(CONFIDENCE, df, loc=mean, scale=error))  # scipy is untyped
    p = float(2 * stats.t.sf(abs(mean) / error, df))
    return Paired(n=n, mean=mean, sd=sd, df=df, low=float(low), high=float(high), p=p)


def with_variance(found: Paired, variance: float) -> Paired:
    """The same with a `variance` of the mean added that the spread between seeds does not hold, known to many degrees.

    The degrees of freedom are Satterthwaite's: (sum of variances)^2 over each variance^2 by its degrees, of which the added
    one's are taken as infinite. They grow where few seeds vary little by chance, so that the interval is never narrower than
    it was.
    """
    if not found.sd or not found.df:
        return found
    widened = (found.sd**2 + found.n * variance) ** 0.5
    wide = _student(found.n, found.mean, widened, found.df * (widened / found.sd) ** 4)
    return wide if (wide.high or 0) > (found.high or 0) else found


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """Several arms minus one reference, in the same seeds."""

    arms: tuple[Paired, ...]
    ratio: float
    """Largest over smallest standard deviation of an arm about the common effects of the seeds."""
    pooled: bool
    """False where one arm varies so much more than the others that each is tested by its own differences."""
    skewed: bool
    """True where seeds stray further to one side: Student's interval may then be too narrow."""


def pooled(differences: Sequence[Sequence[float]]) -> Pooled:
    """Each arm's mean difference to the reference, tested with the variance of all of them; seeds are blocks.

    With an effect for each arm and each seed, what remains has A arms (the reference among them) and S seeds, and its mean
    square (A - 1)(S - 1) degrees of freedom: with three seeds and ten arms 20 in place of 2. An arm that varies more than
    that keeps its own, larger, variance. Cochran's test (1941) tells an arm that varies much more; then nothing is pooled.
    """
    y_As = np.vstack([np.zeros(len(differences[0])), np.asarray(differences, dtype=np.float64)])
    arms, seeds = y_As.shape
    rest_As = y_As - y_As.mean(axis=1, keepdims=True) - y_As.mean(axis=0) + y_As.mean()
    own_A = (rest_As**2).sum(axis=1) / (seeds - 1) * arms / (arms - 1)
    mean_square, df = float((rest_As**2).sum() / ((arms - 1) * (seeds - 1))), (arms - 1) * (seeds - 1)
    small = 1e-24 * float((y_As**2).max())
    ratio = float((own_A.max() / max(own_A.min(), small)) ** 0.5) if mean_square > small else 1.0
    others_A = (own_A.sum() - own_A) / (arms - 1)
    skewed = mean_square > small and _skewed(rest_As)
    critical = float(stats.f.isf(UNEQUAL / arms, seeds - 1, df - (seeds - 1)))
    if mean_square <= small or float((own_A / np.maximum(others_A, small)).max()) > critical:
        return Pooled(arms=tuple(map(paired, differences)), ratio=ratio, pooled=False, skewed=skewed)
    sd_A = np.sqrt(np.maximum(2 * mean_square, own_A[1:] + own_A[0]))
    means = y_As[1:].mean(axis=1)
    found = (_student(seeds, float(mean), float(sd), df) for mean, sd in zip(means, sd_A, strict=True))
    return Pooled(arms=tuple(found), ratio=ratio, pooled=True, skewed=skewed)


def _skewed(rest_As: npt.NDArray[np.float64]) -> bool:
    """D'Agostino's test (1970) at UNEVEN: of what is left of all arms together, and of each where there are seeds enough."""
    arms, seeds = rest_As.shape
    together = _straying(rest_As.ravel()) if rest_As.size >= FEWEST_SKEWED else 1.0
    each = min(map(_straying, rest_As)) if seeds >= FEWEST_SKEWED else 1.0
    return together < UNEVEN or each < UNEVEN / arms


def _straying(values: npt.NDArray[np.float64]) -> float:
    return float(cast("float", stats.skewtest(values).pvalue))  # scipy is untyped


def over_pairs(values: Sequence[float]) -> Paired:
    """The mean over all pairs of seeds, with an interval; `values` are each seed's mean over its pairs with the others.

    The pairs share seeds and are not independent, so the interval is the jackknife's: Student's on the pseudo-values of
    leaving out one seed (Arvesen 1969, for U-statistics). Three seeds at least; of two there is one pair and no interval.
    """
    n, mean = len(values), sum(values) / len(values)
    if n < 3:
        return Paired(n=n, mean=mean, sd=None, df=None, low=None, high=None, p=None)
    # Without seed i the mean over the other pairs is (n mean - 2 value_i) / (n - 2).
    return paired([n * mean - (n - 1) * (n * mean - 2 * value) / (n - 2) for value in values])


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected by Holm (1979): rejecting those below alpha errs with a probability of at most alpha."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(np.arange(len(p), 0, -1) * p[order]).clip(max=1)
    return corrected.tolist()


def least_found(sd: float, n: int, df: float, alpha: float) -> float:
    """The smallest true difference that n pairs find at POWER, if their standard deviation is `sd` (noncentral t)."""
    critical = float(stats.t.isf(alpha / 2, df))
    low, high = 0.0, 4.0 * (critical + 4.0)  # in standard errors
    for _ in range(60):
        middle = (low + high) / 2
        found = float(stats.nct.sf(critical, df, middle))
        low, high = (low, middle) if found >= POWER else (middle, high)
    return high * sd / n**0.5
