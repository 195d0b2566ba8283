"""Rows of a store as a stream. Shuffled: random chunks fill a buffer, random rows of the buffer make the batches.

Chunks of a buffer come from different shards, whose rows were shuffled when they were written: a batch then holds about as
many rows of one document as an independent draw from all rows of those shards would (docs/store-format.md, "Shuffling").

Shapes: R rows of a buffer, B rows per batch, D d_in.
"""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from queue import Full, Queue
from threading import Event, Thread

import numpy as np
import torch

from pipeline.errors import BadInputError
from pipeline.store import format as fmt
from pipeline.store.reader import ActivationStore

BATCHES_AHEAD = 1
"""Batches that wait for the caller, besides the one being made."""


def split_shards(store: ActivationStore, heldout: int) -> tuple[list[int], list[int]]:
    """Shards to train on and shards held out: the last `heldout` ones.

    Raises BadInputError when nothing is left to train on.
    """
    shards = store.shards
    if heldout >= len(shards):
        raise BadInputError(
            f"train.heldout_shards {heldout} leaves nothing to train on: the store has {len(shards)} shards of "
            f"{store.layout.shard_rows} rows; extract more tokens or use smaller shards"
        )
    return shards[:-heldout], shards[-heldout:]


def shuffled_batches(
    store: ActivationStore,
    layer: int,
    shards: Sequence[int],
    *,
    batch_size: int,
    buffer_chunks: int,
    seed: int,
    start: int = 0,
) -> Generator[torch.Tensor, None, None]:
    """Endless float32 batches [B, D], scaled to E||x||^2 = 1, from batch number `start` on.

    Every row comes once per pass over the shards, in an order that depends on `seed`, the pass and the store alone, so the
    number of batches taken is all it needs to go on where a stream was left. Threads read and assemble ahead of the caller,
    holding two buffers in the store's dtype and BATCHES_AHEAD batches; closing the iterator stops them. Raises BadInputError
    for fewer rows than a batch has.
    """
    order = _Order(store.chunks(shards), buffer_chunks, seed)
    if order.rows < batch_size:
        raise BadInputError(f"train.batch_size {batch_size} is more than the {order.rows} rows to train on; lower it")
    return _ahead(_batches(store, layer, order, batch_size, start * batch_size))


def rows_in_order(store: ActivationStore, layer: int, shards: Sequence[int]) -> Iterator[torch.Tensor]:
    """The rows of some shards as they lie, chunk by chunk: float32 [B, D], unscaled."""
    return (store.read(layer, start, stop).float() for start, stop in store.chunks(shards))


@dataclass(frozen=True)
class _Order:
    """Which chunks fill which buffer, and in which order a buffer's rows are taken."""

    chunks: list[tuple[int, int]]
    buffer_chunks: int
    seed: int

    @property
    def rows(self) -> int:
        """Rows of one pass."""
        return sum(stop - start for start, stop in self.chunks)

    @property
    def largest(self) -> int:
        """Most rows that a buffer can have."""
        sizes = sorted(stop - start for start, stop in self.chunks)
        return sum(sizes[-self.buffer_chunks :])

    def buffers(self, row: int) -> Iterator[tuple[list[tuple[int, int]], np.ndarray]]:
        """Chunks of each buffer and its rows still to be taken, endlessly, from the buffer with row number `row` on."""
        done, row = divmod(row, self.rows)
        while True:
            shuffled = np.random.default_rng((self.seed, done)).permutation(len(self.chunks))
            for first in range(0, len(shuffled), self.buffer_chunks):
                picked = [self.chunks[index] for index in shuffled[first : first + self.buffer_chunks]]
                count = sum(stop - start for start, stop in picked)
                if row < count:
                    yield picked, np.random.default_rng((self.seed, done, first)).permutation(count)[row:]
                row = max(0, row - count)
            done += 1


def _batches(
    store: ActivationStore, layer: int, order: _Order, batch_size: int, row: int
) -> Generator[torch.Tensor, None, None]:
    scale, d_in = store.scale(layer), store.layout.d_in
    batch_BD, filled = torch.empty(batch_size, d_in), 0
    for buffer_RD, rows_R in _loaded(store, layer, order, row):
        while len(rows_R):
            taken, rows_R = rows_R[: batch_size - filled], rows_R[batch_size - filled :]
            batch_BD[filled : filled + len(taken)] = buffer_RD[torch.from_numpy(taken)]
            filled += len(taken)
            if filled == batch_size:
                yield batch_BD.mul_(scale)
                # A new one, because the caller may keep the last.
                batch_BD, filled = torch.empty(batch_size, d_in), 0


def _loaded(store: ActivationStore, layer: int, order: _Order, row: int) -> Iterator[tuple[torch.Tensor, np.ndarray]]:
    """Each buffer filled, while the next one is being filled."""
    dtype = fmt.BITS[store.layout.dtype].torch_dtype
    memory = [torch.empty(order.largest, store.layout.d_in, dtype=dtype) for _ in range(2)]
    with ThreadPoolExecutor(store.storage.parallel_reads) as pool:

        def fill(buffer_RD: torch.Tensor, picked: list[tuple[int, int]]) -> list[Future[torch.Tensor]]:
            parts = buffer_RD[: sum(stop - start for start, stop in picked)].split([stop - start for start, stop in picked])
            return [
                pool.submit(store.read, layer, start, stop, part_RD)
                for (start, stop), part_RD in zip(picked, parts, strict=True)
            ]

        buffers = order.buffers(row)
        picked, rows_R = next(buffers)
        filling, turn = fill(memory[0], picked), 0
        for following, next_rows_R in buffers:
            for part in filling:
                part.result()
            filling = fill(memory[1 - turn], following)
            yield memory[turn], rows_R
            rows_R, turn = next_rows_R, 1 - turn


def _ahead(batches: Generator[torch.Tensor, None, None]) -> Generator[torch.Tensor, None, None]:
    """The same batches, made by a thread while the caller works. The thread ends with the iterator."""
    queue: Queue[torch.Tensor | BaseException] = Queue(BATCHES_AHEAD)
    stopped = Event()

    def put(item: torch.Tensor | BaseException) -> None:
        while not stopped.is_set():
            try:
                queue.put(item, timeout=0.1)
                break
            except Full:
                continue

    def produce() -> None:
        try:
            with closing(batches):
                for batch in batches:
                    put(batch)
                    if stopped.is_set():
                        return
        except BaseException as error:
            put(error)

    thread = Thread(target=produce, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item = queue.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
