"""Arms at equal L0: along frontiers, and what is said off them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_results import results_of, row

from pipeline.report.columns import Column
from pipeline.report.frontier import Along, Frontier, pairs
from pipeline.report.metrics import FVU
from pipeline.report.results import Difference, Row

LEVELS = (10.0, 20.0, 40.0)
SLOPE = -0.6
"""d log FVU / d log L0 of the simulated frontier."""


def frontier(arm: str, seed: int, factor: float, l0: tuple[float, ...], rng: np.random.Generator | None = None) -> list[Row]:
    """SAEs on FVU = factor L0^SLOPE, with noise of the seed and of the SAE."""
    noise = (0.01 * rng.standard_normal(len(l0)) if rng else np.zeros(len(l0))).tolist()
    return [
        row(arm, seed, sparsity=level, l0=at, fvu=factor * at**SLOPE * (1 + one), max_decoder_cosine=0.5)
        for level, at, one in zip(LEVELS, l0, noise, strict=True)
    ]


def fvu(rows: list[Row], arm: str = "magnitude") -> Difference:
    (one,) = [
        entry for entry in results_of(rows).differences if (entry.arm, entry.reference, entry.metric) == (arm, "full", "fvu")
    ]
    return one


def test_arms_on_one_frontier_do_not_differ_however_their_l0_fell() -> None:
    """A straight line in log-log is bent in log L0 alone: what is left is less than the error of the interpolation says."""
    rows = [
        *(one for seed in range(3) for one in frontier("full", seed, 1.0, (9.5, 20.0, 41.0))),
        *(one for seed in range(3) for one in frontier("magnitude", seed, 1.0, (10.4, 19.0 + 0.1 * seed, 39.0))),
    ]
    found = fvu(rows)
    assert found.difference == pytest.approx(0, abs=0.002)
    assert found.interpolation_error is not None
    assert found.l0_ratio is None
    assert "Better" not in str(found.verdict)
    # The means without regard to L0 would differ by more.
    means = [np.mean([one.fvu for one in rows if one.arm == arm]) for arm in ("full", "magnitude")]
    assert abs(means[1] - means[0]) > abs(found.difference or 0)


def test_a_difference_at_equal_l0_is_found_where_l0_hides_it() -> None:
    """The arm is better by a tenth, and fires less by so much that its FVU is the same."""
    rng = np.random.default_rng(0)
    less = tuple(level * 0.9 ** (-1 / SLOPE) for level in LEVELS)
    rows = [one for seed in range(5) for one in frontier("full", seed, 1.0, LEVELS, rng)]
    rows += [one for seed in range(5) for one in frontier("magnitude", seed, 0.9, less, rng)]
    assert (fvu(rows).verdict or "").startswith("Better")


@given(st.lists(st.floats(1, 100), min_size=3, max_size=3, unique=True), st.lists(st.floats(1, 100), min_size=3, max_size=3))
def test_nothing_is_extrapolated(ours: list[float], theirs: list[float]) -> None:
    rows = frontier("full", 0, 1.0, tuple(sorted(ours))) + frontier("magnitude", 0, 1.0, tuple(sorted(theirs)))
    for pair in pairs(rows, "magnitude", "full"):
        assert isinstance(pair, Along)
        for each in (pair.ours, pair.theirs):
            reached = [one.l0 or 0 for one in each.rows]
            assert min(reached) <= min(pair.levels) <= max(pair.levels) <= max(reached)
        values = pair.values(FVU)
        assert values is not None
        for value, each in ((values.ours, pair.ours), (values.theirs, pair.theirs)):
            known = [one.fvu or 0 for one in each.rows]
            assert min(known) - 1e-12 <= value <= max(known) + 1e-12  # monotone between its SAEs


def test_frontiers_that_share_no_l0_are_not_compared() -> None:
    rows = frontier("full", 0, 1.0, (1.0, 2.0, 3.0)) + frontier("magnitude", 0, 1.0, (10.0, 20.0, 30.0))
    assert list(pairs(rows, "magnitude", "full")) == []
    assert fvu(rows).verdict == "Not measured in both arms."


def test_l0_itself_is_not_compared_where_it_is_made_equal() -> None:
    rows = frontier("full", 0, 1.0, LEVELS) + frontier("magnitude", 0, 1.0, LEVELS)
    assert {entry.metric for entry in results_of(rows).differences} == {"fvu", "max_decoder_cosine"}


def test_an_sae_missing_from_a_frontier_leaves_the_rest() -> None:
    rows = frontier("full", 0, 1.0, LEVELS)[1:] + frontier("magnitude", 0, 0.5, LEVELS)
    (pair,) = pairs(rows, "magnitude", "full")
    assert isinstance(pair, Along)
    assert pair.levels == (20.0, 40.0)
    assert Frontier.of(rows).means(Column(("loss", "sae")), (20.0,)) is None


def test_the_middle_sae_stands_for_its_arm() -> None:
    results = results_of(frontier("full", 0, 1.0, LEVELS))
    assert results.levels == [10, 20, 40]
    assert [one.sparsity for one in results.of_layer(2)] == [20]


@pytest.mark.parametrize("ratio", [0.9, 0.96, 0.98, 1.02, 1.1])
@pytest.mark.parametrize("seeds", [3, 5])
def test_equal_arms_at_another_l0_are_rarely_called_different(ratio: float, seeds: int) -> None:
    """Off the frontier: one SAE of each arm, on one frontier, whose L0 differ."""
    rng = np.random.default_rng(1)
    verdicts: list[str] = []
    for _ in range(200):
        rows: list[Row] = []
        for arm, l0 in (("full", 20.0), ("magnitude", 20.0 * ratio)):
            for seed in range(seeds):
                value = 0.2 * (l0 / 20) ** SLOPE + 0.0005 * rng.standard_normal()
                rows.append(row(arm, seed, l0=l0, fvu=value))
        verdicts.append(str(fvu(rows).verdict))
    wrong = sum(verdict.startswith(("Better", "Worse")) for verdict in verdicts)
    assert wrong <= 0.05 * len(verdicts)
    if abs(ratio - 1) > 0.05:
        assert any("at another L0" in verdict for verdict in verdicts)


def test_what_l0_alone_cannot_make_is_told() -> None:
    rows = [row("full", seed, l0=20.0, fvu=0.20 + 0.0005 * seed) for seed in range(4)]
    rows += [row("magnitude", seed, l0=20.2, fvu=0.19 + 0.0004 * seed**2) for seed in range(4)]
    found = fvu(rows)
    assert (found.verdict or "").startswith("Better")
    assert found.l0_allowance == pytest.approx(0.00199, rel=0.05)
