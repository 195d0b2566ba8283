"""What the verdicts of a page are worth: studies with a known truth, tested by the report's own statistics.

    python benchmarks/verdicts.py [--pages 2000]

Each page has families of arms beside one reference, one family for each metric and layer, in the same seeds. False: share
of pages that tell of any difference where there is none. Covered: share of 95 % intervals that hold the truth. Told:
share of pages that tell of one arm that differs by four standard deviations of a difference in one metric.
"""

import argparse
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from measure import show

from pipeline.report.statistics import holm, pooled

METRICS, ARMS, DIFFERENT = 4, 10, 4.0
Noise = Callable[[np.random.Generator, int, int], npt.NDArray[np.float64]]


def normal(rng: np.random.Generator, arms: int, seeds: int) -> npt.NDArray[np.float64]:
    """Mean 0, standard deviation 1, as the others."""
    return rng.standard_normal((arms, seeds))


def heavy(rng: np.random.Generator, arms: int, seeds: int) -> npt.NDArray[np.float64]:
    """Student's t with 3 degrees of freedom."""
    return rng.standard_t(3, (arms, seeds)) / math.sqrt(3)


def skewed(rng: np.random.Generator, arms: int, seeds: int) -> npt.NDArray[np.float64]:
    """Lognormal."""
    return (np.exp(rng.standard_normal((arms, seeds))) - math.exp(0.5)) / math.sqrt((math.e - 1) * math.e)


def collapsing(rng: np.random.Generator, arms: int, seeds: int) -> npt.NDArray[np.float64]:
    """One seed in ten ends five standard deviations away."""
    return rng.standard_normal((arms, seeds)) - 5 * (rng.random((arms, seeds)) < 0.1) + 0.5


def quiet_reference(rng: np.random.Generator, arms: int, seeds: int) -> npt.NDArray[np.float64]:
    """Lognormal in all arms but the reference, which is normal."""
    return np.vstack([normal(rng, 1, seeds), skewed(rng, arms - 1, seeds)])


def skewed_reference(rng: np.random.Generator, arms: int, seeds: int) -> npt.NDArray[np.float64]:
    """Lognormal in the reference alone."""
    return np.vstack([skewed(rng, 1, seeds), normal(rng, arms - 1, seeds)])


EQUAL = [1.0] * (ARMS + 1)
CELLS: dict[str, tuple[list[float], Noise]] = {
    "normal": (EQUAL, normal),
    "heavy tails (t3)": (EQUAL, heavy),
    "lognormal in all arms": (EQUAL, skewed),
    "lognormal in all but the reference": (EQUAL, quiet_reference),
    "lognormal in the reference alone": (EQUAL, skewed_reference),
    "one seed in ten collapses": (EQUAL, collapsing),
    "arms vary by 1 and 2 in turn": ([1.0, 2.0] * 5 + [1.0], normal),
    "by 1 and 3 in turn": ([1.0, 3.0] * 5 + [1.0], normal),
    "one arm varies 5 times as much": ([1.0, 5.0, *[1.0] * 9], normal),
    "the reference varies 5 times as much": ([5.0, *[1.0] * 10], normal),
}
"""Standard deviations, the reference first, and the form of the noise."""


def page(
    rng: np.random.Generator, seeds: int, layers: int, sds: list[float], noise: Noise, effect: float
) -> tuple[npt.NDArray[np.bool_], float, float, float]:
    """Which comparisons are told, the share of intervals that cover, and the shares of families not pooled and skewed."""
    p: list[float] = []
    covered: list[bool] = []
    apart = uneven = 0
    for family in range(METRICS * layers):
        y_AS = noise(rng, len(sds), seeds) * np.array(sds)[:, None] + 2 * rng.standard_normal(seeds)
        shift = effect * math.sqrt(2) if family == 0 else 0.0
        y_AS[1] += shift
        found = pooled((y_AS[1:] - y_AS[0]).tolist())
        apart += not found.pooled
        uneven += found.skewed
        p += [1.0 if one.p is None else one.p for one in found.arms]
        truth = [shift, *[0.0] * (len(sds) - 2)]
        covered += [(one.low or 0) <= true <= (one.high or 0) for one, true in zip(found.arms, truth, strict=True)]
    return np.array(holm(p)) < 0.05, float(np.mean(covered)), apart / (METRICS * layers), uneven / (METRICS * layers)


def main() -> None:
    """Simulate every cell and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pages", type=int, default=2000)
    args = parser.parse_args()
    lines: list[list[str]] = []
    for name, (sds, noise) in CELLS.items():
        for seeds, layers in ((3, 1), (3, 3), (5, 1), (5, 3), (20, 1)):
            rng = np.random.default_rng(1)
            none = [page(rng, seeds, layers, sds, noise, 0.0) for _ in range(args.pages // (3 if layers > 1 else 1))]
            some = [page(rng, seeds, layers, sds, noise, DIFFERENT) for _ in range(args.pages // 10)]
            shares = (
                np.mean([told.any() for told, _, _, _ in none]),
                np.mean([covers for _, covers, _, _ in none]),
                np.mean([told[0] for told, _, _, _ in some]),
                np.mean([apart for _, _, apart, _ in none]),
                np.mean([uneven for _, _, _, uneven in none]),
            )
            lines.append([name, str(seeds), str(layers), *(f"{share:.3f}" for share in shares)])
            name = ""
    show(
        f"{ARMS} arms, {METRICS} metrics",
        ["noise", "seeds", "layers", "false", "covered", "told", "not shared", "skewed"],
        lines,
    )


if __name__ == "__main__":
    main()
