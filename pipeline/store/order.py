"""The order of a stream of rows. It follows from numbers alone: a stream can begin at any row, before its shards exist.

A pass takes the shards in random order, a window of them at a time. Within a window, random chunks fill a buffer, and random
rows of it make the batches.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count

import numpy as np
import numpy.typing as npt

Bounds = tuple[int, int]
"""First row of a chunk and one past its last."""


@dataclass(frozen=True, kw_only=True)
class Filled:
    """What fills the buffer once: some chunks, and the order in which their rows are taken."""

    window: int
    """Number of the window that the chunks are of, counted over all passes."""
    chunks: list[Bounds]
    key: tuple[int, ...]
    """Seed of the order of the rows."""
    first: int = 0
    end: int | None = None
    """Part of that order that is taken: at the beginning and at the end of a stream not all."""

    @property
    def rows(self) -> int:
        """Rows of the chunks."""
        return sum(stop - start for start, stop in self.chunks)

    def order(self) -> npt.NDArray[np.int64]:
        """Numbers of the rows that are taken, in their order."""
        return np.random.default_rng(self.key).permutation(self.rows)[self.first : self.end]


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of an endless stream."""

    chunks: Mapping[int, Sequence[Bounds]]
    """The chunks of every shard of a pass."""
    buffer_chunks: int
    seed: int
    window_shards: int | None = None
    """Shards of a window; None for all. Windows are of about equal size, so that none mixes much less than the others."""

    @property
    def rows(self) -> int:
        """Rows of one pass."""
        return sum(stop - start for of_shard in self.chunks.values() for start, stop in of_shard)

    @property
    def largest(self) -> int:
        """Rows of the largest possible buffer."""
        sizes = sorted(stop - start for of_shard in self.chunks.values() for start, stop in of_shard)
        return sum(sizes[-self.buffer_chunks :])

    def filled(self, row: int, stop: float = math.inf) -> Iterator[Filled]:
        """All that fills the buffer from row number `row` of the stream on, up to row `stop`."""
        done = row // self.rows
        at = done * self.rows
        for number in count(done * self._windows):
            for one in self._window(number):
                if at >= stop:
                    return
                if at + one.rows > row:
                    yield replace(one, first=max(0, row - at), end=int(min(one.rows, stop - at)))
                at += one.rows

    def shards(self, row: int, stop: float = math.inf) -> Iterator[tuple[int, list[int]]]:
        """The number of each window, and the shards that are read of it from row number `row` on, up to row `stop`."""
        of_chunk = {bounds: shard for shard, of_shard in self.chunks.items() for bounds in of_shard}
        window, shards = -1, dict[int, None]()
        for one in self.filled(row, stop):
            if one.window != window and shards:
                yield window, list(shards)
                shards = {}
            window = one.window
            shards |= dict.fromkeys(of_chunk[bounds] for bounds in one.chunks)
        if shards:
            yield window, list(shards)

    @property
    def _windows(self) -> int:
        """Windows of a pass."""
        return 1 if self.window_shards is None else -(-len(self.chunks) // self.window_shards)

    def _window(self, number: int) -> Iterator[Filled]:
        """All that fills the buffer of a window."""
        done, place = divmod(number, self._windows)
        shards, key = list(self.chunks), (self.seed, done)
        if self.window_shards is not None:
            shuffled = np.random.default_rng(key).permutation(len(shards))
            of_window: list[int] = np.array_split(shuffled, self._windows)[place].tolist()
            shards = [shards[index] for index in of_window]
            key = (*key, place + 1)
        chunks = [bounds for shard in shards for bounds in self.chunks[shard]]
        of_buffers: list[int] = np.random.default_rng(key).permutation(len(chunks)).tolist()
        picked = [chunks[index] for index in of_buffers]
        for first in range(0, len(picked), self.buffer_chunks):
            yield Filled(window=number, chunks=picked[first : first + self.buffer_chunks], key=(*key, first))
