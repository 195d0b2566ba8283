"""Cuts groups of SAEs into the pieces that workers take, by what each is predicted to take."""

import heapq
from collections.abc import Callable, Sequence
from typing import TypeVar

S = TypeVar("S")

Seconds = Callable[[Sequence[S]], float]
"""What some SAEs of a group take together, reading their rows once. Only ratios count."""
MOST_PIECES = 4
"""Pieces for each worker that are tried."""
ALMOST = 1.05
"""Pieces that end this much later than the best are as good: the prediction is no better. Of those the smallest are taken,
with which workers that are unequally fast end together, too."""


def pieces(groups: Sequence[Sequence[S]], workers: int, seconds: Seconds[S]) -> list[list[S]]:
    """The groups in pieces for so many workers, the longest first. Each piece is a run of one group's SAEs.

    Every piece reads its rows anew, so that many pieces share the work evenly, and few read little. One worker takes whole
    groups, in their order.
    """
    left = [group for group in groups if group]
    if workers == 1 or not left:
        return [list(group) for group in left]
    alone = [[seconds([sae]) for sae in group] for group in left]
    tried: list[tuple[float, list[list[S]]]] = []
    counts = [1] * len(left)
    while sum(counts) <= max(len(left), MOST_PIECES * workers):
        cut = [run for group, each, count in zip(left, alone, counts, strict=True) for run in _runs(group, each, count)]
        tried.append((_end([seconds(run) for run in cut], workers), cut))
        # The next piece is cut from the group whose pieces are the longest, until those are single SAEs.
        longest = max(range(len(left)), key=lambda number: sum(alone[number]) / counts[number])
        if counts[longest] == len(left[longest]):
            break
        counts[longest] += 1
    soonest = min(end for end, _ in tried)
    chosen = next(cut for end, cut in reversed(tried) if end <= ALMOST * soonest)
    return sorted(chosen, key=seconds, reverse=True)


def _runs(group: Sequence[S], alone: Sequence[float], count: int) -> list[list[S]]:
    """The group in at most so many runs that take about equally long; `alone` is what each of it takes."""
    runs: list[list[S]] = [[] for _ in range(count)]
    before, whole = 0.0, sum(alone)
    for sae, took in zip(group, alone, strict=True):
        runs[int(count * (before + took / 2) / whole)].append(sae)
        before += took
    return [run for run in runs if run]


def _end(seconds: Sequence[float], workers: int) -> float:
    """When the last worker ends, if each takes the longest piece that is left when it is free."""
    free = [0.0] * workers
    for took in sorted(seconds, reverse=True):
        heapq.heapreplace(free, free[0] + took)
    return max(free)
