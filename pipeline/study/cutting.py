"""Cuts the work of a study into what workers take when they are free: shards to make, and SAEs to train or evaluate."""

import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from pipeline.study.planned import TrainedSAE

S = TypeVar("S")

Seconds = Callable[[Sequence[S]], float]
"""What some SAEs of a group take together, reading their rows once. Only ratios count."""
MOST_PIECES = 4
"""Pieces for each worker that are tried."""
ALMOST = 1.05
"""Pieces that end this much later than the best are as good: the prediction is no better. Of those the smallest are taken,
with which workers that are unequally fast end together, too."""


def streams(saes: Iterable[TrainedSAE]) -> list[list[TrainedSAE]]:
    """SAEs in groups that can share one stream of batches. Those that are matched to others come last, by themselves."""
    found: dict[tuple[bool, int, int], list[TrainedSAE]] = {}
    for sae in sorted(saes, key=lambda sae: sae.matched_to is not None):
        # Beside the order of batches, no arm changes them (`arms.SHARED`).
        found.setdefault((sae.matched_to is not None, sae.layer, sae.recipe.data_seed), []).append(sae)
    return list(found.values())


def part_sizes(shards: int, workers: int) -> list[int]:
    """How many shards each part has: 1 / (2 workers) of what is left when it is taken, and at least one.

    The first parts are large, since every part costs some time; the last are single shards, so that no worker is left with
    much when the others have ended (Polychronopoulos and Kuck 1987, "Guided Self-Scheduling").
    """
    sizes: list[int] = []
    while shards:
        sizes.append(max(1, shards // (2 * workers)))
        shards -= sizes[-1]
    return sizes


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
        tried.append((last_end([seconds(run) for run in cut], workers), cut))
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


def last_end(seconds: Iterable[float], workers: int) -> float:
    """When the last worker ends, if each takes the longest piece that is left when it is free."""
    free = [0.0] * workers
    for took in sorted(seconds, reverse=True):
        heapq.heapreplace(free, free[0] + took)
    return max(free)
