"""Compares two arms at equal L0: along their frontiers, which are their SAEs of one seed trained at several L0."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
from scipy.interpolate import PchipInterpolator

from pipeline.report.columns import Column
from pipeline.report.results import Row

DISTINCT = 1.001
"""Ratio of two L0 from which on they are two points of a frontier."""


@dataclass(frozen=True, kw_only=True)
class Values:
    """A metric of two arms in one seed, and how much of their difference depends on the form of the interpolation."""

    ours: float
    theirs: float
    error: float | None = None
    """|difference by monotone cubics - difference by straight lines|; None without interpolation."""


class Pair(Protocol):
    """Two arms in one seed, as they are compared."""

    @property
    def seed(self) -> int:
        """The seed."""
        ...

    def values(self, column: Column) -> Values | None:
        """A metric of both; None where one has none."""
        ...

    @property
    def weights(self) -> list[tuple[Row, float]]:
        """The difference as a weighted sum over SAEs, with straight lines between those of a frontier."""
        ...


@dataclass(frozen=True)
class Single:
    """One SAE of each arm, whatever their L0."""

    ours: Row
    theirs: Row

    @property
    def seed(self) -> int:
        """The seed of both."""
        return self.ours.seed

    def values(self, column: Column) -> Values | None:
        """A metric of both; None where one has none."""
        known: tuple[float | None, float | None] = (column.of(self.ours), column.of(self.theirs))
        ours, theirs = known
        return None if ours is None or theirs is None else Values(ours=ours, theirs=theirs)

    @property
    def weights(self) -> list[tuple[Row, float]]:
        """One minus the other."""
        return [(self.ours, 1.0), (self.theirs, -1.0)]


@dataclass(frozen=True)
class Along:
    """Two frontiers, compared at the same L0: the mean over `levels` within both."""

    ours: "Frontier"
    theirs: "Frontier"
    levels: tuple[float, ...]

    @property
    def seed(self) -> int:
        """The seed of both."""
        return self.ours.rows[0].seed

    def values(self, column: Column) -> Values | None:
        """A metric of both; None where an SAE has none."""
        one, other = self.ours.means(column, self.levels), self.theirs.means(column, self.levels)
        if one is None or other is None:
            return None
        (ours, ours_straight), (theirs, theirs_straight) = one, other
        error = abs((ours - theirs) - (ours_straight - theirs_straight))
        return Values(ours=ours, theirs=theirs, error=error)

    @property
    def weights(self) -> list[tuple[Row, float]]:
        """The weights of straight lines through each frontier."""
        ours, theirs = self.ours.weights(self.levels), self.theirs.weights(self.levels)
        return [*zip(self.ours.rows, ours, strict=True), *zip(self.theirs.rows, [-each for each in theirs], strict=True)]


@dataclass(frozen=True)
class Frontier:
    """The sound SAEs of one arm, seed and layer, by rising L0."""

    rows: tuple[Row, ...]

    @classmethod
    def of(cls, rows: Sequence[Row]) -> "Frontier":
        """Without SAEs of an L0 that another one has."""
        distinct: list[Row] = []
        for row in sorted((row for row in rows if row.l0), key=lambda row: row.l0 or 0):
            if not distinct or (row.l0 or 0) > DISTINCT * (distinct[-1].l0 or 0):
                distinct.append(row)
        return cls(tuple(distinct))

    @property
    def log_l0(self) -> npt.NDArray[np.float64]:
        """Where its SAEs are."""
        return np.log(np.array([row.l0 for row in self.rows], dtype=np.float64))

    def means(self, column: Column, levels: Sequence[float]) -> tuple[float, float] | None:
        """Mean of a metric over L0 within the frontier: by monotone cubics in log L0, and by straight lines."""
        values: list[float | None] = [column.of(row) for row in self.rows]
        if None in values:
            return None
        at, known = np.log(np.array(levels)), np.array(values, dtype=np.float64)
        cubic = cast("npt.NDArray[np.float64]", PchipInterpolator(self.log_l0, known)(at))  # scipy is untyped
        return float(cubic.mean()), float(np.interp(at, self.log_l0, known).mean())

    def weights(self, levels: Sequence[float]) -> list[float]:
        """The weight of each SAE in the mean over L0 by straight lines."""
        at = np.log(np.array(levels, dtype=np.float64))
        units = ([float(row is other) for other in self.rows] for row in self.rows)
        return [float(np.interp(at, self.log_l0, np.array(unit)).mean()) for unit in units]


def pairs(rows: Sequence[Row], arm: str, reference: str) -> Iterator[Pair]:
    """Each seed in which both arms have something to compare.

    Where both were trained at several L0, these L0 are moved into the range that both reach: nothing is extrapolated.
    """
    for seed in dict.fromkeys(row.seed for row in rows if row.arm == arm):
        ours, theirs = ([row for row in rows if (row.arm, row.seed) == (name, seed)] for name in (arm, reference))
        levels = [row.sparsity for row in ours if row.sparsity is not None]
        if not levels:
            yield from (Single(ours[0], other) for other in theirs[:1])
        elif found := _along(Frontier.of(ours), Frontier.of(theirs), levels):
            yield found


def _along(ours: Frontier, theirs: Frontier, levels: Sequence[float]) -> Along | None:
    if min(len(ours.rows), len(theirs.rows)) < 2:
        return None
    low = max(each.rows[0].l0 or 0 for each in (ours, theirs))
    high = min(each.rows[-1].l0 or 0 for each in (ours, theirs))
    return Along(ours, theirs, tuple(sorted({min(max(level, low), high) for level in levels}))) if low < high else None
