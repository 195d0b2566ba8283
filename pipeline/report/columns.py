"""Defines what an entry of the table of metrics consists of, and reads its values from rows."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from enum import StrEnum
from statistics import stdev
from typing import Any, Literal

from pipeline.report.results import Row
from pipeline.report.text import signed
from pipeline.study.sections import Worth


class Group(StrEnum):
    """The groups that metrics stand in, in the order in which differences are listed."""

    probing = "probing"
    reconstruction = "reconstruction"
    latents = "latents"
    fidelity = "fidelity"
    bench = "bench"
    truth = "truth"
    geometry = "geometry"
    pairs = "pairs"
    capture = "capture"
    planted = "planted"
    suite = "suite"
    rates = "rates"
    effort = "effort"


HEADINGS: dict[Group, str] = {
    Group.reconstruction: "Reconstruction",
    Group.latents: "Latents",
    Group.probing: "Sparse probing accuracy with k latents",
    Group.bench: "SynthSAEBench",
    Group.truth: "True features",
    Group.pairs: "Similar latents",
    Group.capture: "Pair capture",
}
"""The groups of the main table, in its order. Metrics of the other groups stand in the table of all SAEs only."""
SUITE_HEADINGS = {Group.suite: "SAEBench"}
"""Those of the table below it."""


class Caveat(StrEnum):
    """A condition on two arms without which a difference gets no verdict of better or worse."""

    equal_l0 = "equal L0"
    """The metric improves by itself when more latents fire."""
    near_l0 = "near L0"
    """The metric moves with L0, in either direction."""


@dataclass(frozen=True)
class Term:
    """An entry of the glossary."""

    anchor: str
    title: str
    text: str


@dataclass(frozen=True)
class Planned:
    """Marks a metric by which the study was planned to compare arms."""

    heading: str
    worth_of: str
    """Field of the experiment's section [worth]."""
    worth: float = math.nan
    """The difference that would matter, as that field of a study says."""

    def of_study(self, worth: Worth) -> "Planned":
        """The same with the study's value."""
        return replace(self, worth=getattr(worth, self.worth_of))


@dataclass(frozen=True)
class Brief:
    """A column of the terminal's table."""

    title: str
    digits: int = 3
    spread: bool = True
    """True if the standard error over seeds is shown."""
    of: tuple[str, ...] | None = None
    """Path of the number that this one is a share of. The table shows both: `.45 of 12`."""


@dataclass(frozen=True)
class Column:
    """A column of results.csv: a value at a path in a row of results.json."""

    path: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its heading in results.csv, and a metric's name in differences and comparisons."""
        return "_".join(self.path)

    def of(self, row: Row) -> Any:
        """Its value in a row."""
        return row.at(self.path)


@dataclass(frozen=True)
class Metric(Column):
    """A column that the page shows as well."""

    heading: str
    term: Term
    show: Callable[[float], str]
    """How a value is written."""
    group: Group
    _: KW_ONLY
    better: Literal["higher", "lower"] | None = None
    compared: bool = True
    """True if differences between arms are taken."""
    planned: Planned | None = None
    """Without it, differences are exploratory."""
    caveat: Caveat | None = None
    pareto: str | None = None
    """Heading of its plot against L0; None without one."""
    brief: Brief | None = None

    def of(self, row: Row) -> float | None:
        """Its value in a row."""
        return row.at(self.path)

    def difference(self, value: float | None) -> str | None:
        """A difference as the page writes it, with its sign."""
        return None if value is None else signed(self.show(value))


Family = Callable[[Sequence[str], Sequence[str]], Iterable[Column]]
"""Makes the columns that depend on the study, from its sizes of probes and the names of its tasks."""


def by_arm(rows: Iterable[Row], column: Column) -> dict[str, list[float]]:
    """The numbers of every arm in a column, in the order of the rows; arms without any are left out."""
    values: dict[str, list[float]] = {}
    for row in rows:
        value = column.of(row)
        if value is not None:
            values.setdefault(row.arm, []).append(value)
    return values


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of at least two values."""
    return stdev(values) / len(values) ** 0.5
