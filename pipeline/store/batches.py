"""Streams the rows of a store, in order or shuffled: random chunks fill a buffer, random rows of it make the batches.

The chunks of a buffer come from different shards, and each shard's rows were shuffled when they were written. So a batch
has about as many rows of one document as if it were drawn independently from all rows of those shards (docs/store-format.md,
"Shuffling").
"""

from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from queue import Full, Queue
from threading import Event, Thread
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from pipeline.errors import BadInputError
from pipeline.runtime.devices import CPU
from pipeline.runtime.transfer import HostBuffers
from pipeline.store import format as fmt
from pipeline.store.limits import FEWEST_HELDOUT
from pipeline.store.reader import ActivationStore

BATCHES_AHEAD = 1
"""Finished batches in the queue, besides the one being made."""

T = TypeVar("T")
Bounds = tuple[int, int]
"""First row of a chunk and one past its last."""


def split_shards(store: ActivationStore, heldout: int, within: int | None = None) -> tuple[list[int], list[int]]:
    """Shards to train on, and the last `heldout` shards of the first `within` rows, by default of all, which are held out.

    Raises BadInputError when nothing is left to train on, and for fewer than FEWEST_HELDOUT held-out rows.
    """
    shards, size = store.shards, store.layout.shard_rows
    check_heldout([store.commits[shard].rows for shard in shards], size, heldout, within)
    stop = _held_until(len(shards), size, within)
    return [*shards[: stop - heldout], *shards[stop:]], shards[stop - heldout : stop]


def check_heldout(rows: Sequence[int], shard_rows: int, heldout: int, within: int | None = None) -> int:
    """Rows of the shards that `split_shards` holds out, given the rows of each shard. Raises what that does."""
    stop = _held_until(len(rows), shard_rows, within)
    if heldout >= len(rows) or heldout > stop:
        raise BadInputError(
            f"train.heldout_shards {heldout} leaves nothing to train on: the store has {len(rows)} shards of "
            f"{shard_rows} rows; extract more tokens or use smaller shards"
        )
    if (held := sum(rows[stop - heldout : stop])) < FEWEST_HELDOUT:
        raise BadInputError(
            f"train.heldout_shards {heldout} holds out {held} rows, and fewer than {FEWEST_HELDOUT} measure nothing: "
            f"set it to {heldout + 1}, or store.tokens to a multiple of store.shard_rows {shard_rows}"
        )
    return held


def _held_until(shards: int, shard_rows: int, within: int | None) -> int:
    """One past the last held-out shard."""
    return shards if within is None else min(shards, -(-within // shard_rows))


def shuffled_batches(
    store: ActivationStore,
    layer: int,
    shards: Sequence[int],
    *,
    batch_size: int,
    buffer_chunks: int,
    seed: int,
    start: int = 0,
    device: torch.device = CPU,
) -> Generator[torch.Tensor, None, None]:
    """Endless float32 batches [B, D] on a device, scaled to E||x||^2 = 1, from batch number `start` on.

    Every row comes once per pass over the shards. The order depends only on `seed`, the pass and the store, so the number of
    batches taken is enough to resume a stream. Threads read ahead of the caller and hold two buffers in the store's dtype
    and BATCHES_AHEAD batches; closing the iterator stops them. Raises BadInputError for fewer rows than one batch.
    """
    order = _Order(store.chunks(shards), buffer_chunks, seed)
    if order.rows < batch_size:
        raise BadInputError(f"train.batch_size {batch_size} is more than the {order.rows} rows to train on; lower it")
    scale, row = store.scale(layer), start * batch_size
    dtype, shape = fmt.BITS[store.layout.dtype].torch_dtype, (batch_size, store.layout.d_in)
    if device.type == "cpu":
        one = HostBuffers(1, shape, dtype, device)
        # A copy also of float32 rows, because the buffer is filled again.
        gathered = _gathered(store, layer, order, one, row)
        return ahead(batch_BD.to(torch.float32, copy=True).mul_(scale) for batch_BD in gathered)
    # One that is filled, those in the queue, one that is taken from it, and one whose copy is still under way.
    some = HostBuffers(BATCHES_AHEAD + 3, shape, dtype, device)
    return _sent(ahead(_gathered(store, layer, order, some, row)), some, scale)


def rows_in_order(store: ActivationStore, layer: int, shards: Sequence[int]) -> Iterator[torch.Tensor]:
    """The rows of some shards in stored order, chunk by chunk: float32 [B, D], unscaled."""
    return (store.read(layer, start, stop).float() for start, stop in store.chunks(shards))


@dataclass(frozen=True)
class _Order:
    """The order of a stream: which chunks fill each buffer, and in which order its rows are taken."""

    chunks: list[Bounds]
    buffer_chunks: int
    seed: int

    @property
    def rows(self) -> int:
        """Rows of one pass."""
        return sum(stop - start for start, stop in self.chunks)

    @property
    def largest(self) -> int:
        """Rows of the largest possible buffer."""
        sizes = sorted(stop - start for start, stop in self.chunks)
        return sum(sizes[-self.buffer_chunks :])

    def buffers(self, row: int) -> Iterator[tuple[list[Bounds], npt.NDArray[np.int64]]]:
        """Endlessly, each buffer's chunks and its rows in random order, beginning with row number `row` of the stream."""
        done, row = divmod(row, self.rows)
        while True:
            shuffled: list[int] = np.random.default_rng((self.seed, done)).permutation(len(self.chunks)).tolist()
            for first in range(0, len(shuffled), self.buffer_chunks):
                picked = [self.chunks[index] for index in shuffled[first : first + self.buffer_chunks]]
                count = sum(stop - start for start, stop in picked)
                if row < count:
                    yield picked, np.random.default_rng((self.seed, done, first)).permutation(count)[row:]
                row = max(0, row - count)
            done += 1


def _gathered(
    store: ActivationStore, layer: int, order: _Order, buffers: HostBuffers, row: int
) -> Generator[torch.Tensor, None, None]:
    """Batches in the store's dtype, unscaled, each in the next of the buffers."""
    batch, filled = buffers.next(), 0
    for buffer_RD, rows_R in _loaded(store, layer, order, row):
        while len(rows_R):
            taken, rows_R = rows_R[: len(batch) - filled], rows_R[len(batch) - filled :]
            torch.index_select(buffer_RD, 0, torch.from_numpy(taken), out=batch[filled : filled + len(taken)])
            filled += len(taken)
            if filled == len(batch):
                yield batch
                batch, filled = buffers.next(), 0


def _sent(
    batches: Generator[torch.Tensor, None, None], buffers: HostBuffers, scale: float
) -> Generator[torch.Tensor, None, None]:
    """The batches on the device of the buffers, converted and scaled there."""
    with closing(batches):
        for number, _ in enumerate(batches):
            yield buffers.send(number).float().mul_(scale)


def _loaded(
    store: ActivationStore, layer: int, order: _Order, row: int
) -> Iterator[tuple[torch.Tensor, npt.NDArray[np.int64]]]:
    """Each buffer and the order of its rows; the next buffer is filled in the meantime."""
    dtype = fmt.BITS[store.layout.dtype].torch_dtype
    memory = [torch.empty(order.largest, store.layout.d_in, dtype=dtype) for _ in range(2)]
    with ThreadPoolExecutor(store.storage.parallel_reads) as pool:

        def fill(buffer_RD: torch.Tensor, picked: list[Bounds]) -> list[Future[torch.Tensor]]:
            filling: list[Future[torch.Tensor]] = []
            filled = 0
            for start, stop in picked:
                part_RD = buffer_RD[filled : filled + stop - start]
                filling.append(pool.submit(store.read, layer, start, stop, part_RD))
                filled += len(part_RD)
            return filling

        buffers = order.buffers(row)
        picked, rows_R = next(buffers)
        filling, turn = fill(memory[0], picked), 0
        for following, next_rows_R in buffers:
            for part in filling:
                part.result()
            filling = fill(memory[1 - turn], following)
            yield memory[turn], rows_R
            rows_R, turn = next_rows_R, 1 - turn


def ahead(batches: Generator[T, None, None]) -> Generator[T, None, None]:
    """The same batches, made by a thread while the caller works. Closing the iterator ends the thread."""
    queue: Queue[T | BaseException | None] = Queue(BATCHES_AHEAD)
    """Batches, then an error or, at the end, None."""
    stopped = Event()

    def put(item: T | BaseException | None) -> None:
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
            put(None)
        except BaseException as error:
            put(error)

    thread = Thread(target=produce, name="batches", daemon=True)
    thread.start()
    try:
        while True:
            item = queue.get()
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        thread.join()
