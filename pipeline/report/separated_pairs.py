"""Fills the page's part on pairs that an arm separates: a table of all arms, and the pairs themselves of one SAE each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from pipeline.report.columns import mean, standard_error
from pipeline.report.latents import SeparatedOf
from pipeline.report.results import Results
from pipeline.report.tables import Cell

COLUMNS: tuple[tuple[str, Callable[[SeparatedOf], float]], ...] = (
    ("separated", lambda one: one.separated / one.pairs),
    ("in place", lambda one: one.in_place / one.pairs),
    ("lost", lambda one: one.lost / one.pairs),
    ("left", lambda one: one.after / one.before),
)
"""Heading and value, a share, of the columns of the table."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """What became of the pairs in an arm, mean over seeds, or why there are none."""

    arm: str
    control: str
    cells: list[Cell]


@dataclass(frozen=True, kw_only=True)
class SeparatedPart:
    """All that the page shows of it in a layer."""

    headings: list[str]
    lines: list[Line]
    placebos: list[str]
    """Arms without a penalty, on another order of batches."""
    shown: list[SeparatedOf]
    """SAEs of the first arm with a penalty (`full`, if there is one) and of the placebos."""
    others: list[SeparatedOf]
    """Those of the other arms."""
    texts: bool
    """Whether there are any."""


def separated_pairs(results: Results, layer: int) -> SeparatedPart | None:
    """The part of a layer; None where no arm has a control."""
    found = [one for one in results.separated if one.layer == layer and one.sparsity == results.shown_level]
    if not found:
        return None
    by_arm = {arm: [one for one in found if one.arm == arm] for arm in dict.fromkeys(one.arm for one in found)}
    # Of an arm the SAE with pairs, or one of those that have none.
    first = {arm: max(of_arm, key=lambda one: len(one.shown)) for arm, of_arm in by_arm.items()}
    placebos = [arm for arm, one in first.items() if one.placebo]
    penalised = [arm for arm in first if arm not in placebos]
    foremost = (["full"] if "full" in penalised else penalised[:1]) + placebos
    return SeparatedPart(
        headings=[heading for heading, _ in COLUMNS],
        lines=[_line(arm, of_arm) for arm, of_arm in by_arm.items()],
        placebos=placebos,
        shown=[first[arm] for arm in foremost],
        others=[one for arm, one in first.items() if arm not in foremost and one.shown],
        texts=any(pair.together for one in found for pair in one.shown),
    )


def _line(arm: str, of_arm: Sequence[SeparatedOf]) -> Line:
    followed = [one for one in of_arm if one.pairs]
    cells = [_cell([share(one) for one in followed]) for _, share in COLUMNS]
    if not followed:
        cells = [Cell(of_arm[0].reason, span=len(COLUMNS))]
    return Line(arm=arm, control=of_arm[0].control, cells=cells)


def _cell(shares: Sequence[float]) -> Cell:
    if not shares:
        return Cell(None)
    spread = f"±{_whole(standard_error(shares))}" if len(shares) > 1 else None
    return Cell(_whole(mean(shares)), spread)


def _whole(share: float) -> str:
    return f"{100 * share:.0f}%"
