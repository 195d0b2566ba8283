"""Streams the rows of a store, in order or shuffled, with threads that read ahead of the caller.

The chunks of a buffer come from different shards, and each shard's rows were shuffled when they were written. So a batch
has about as many rows of one document as if it were drawn independently from all rows of those shards (docs/store-format.md,
"Shuffling").
"""

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from pipeline.errors import BadInputError
from pipeline.runtime.devices import CPU
from pipeline.runtime.interrupt import stop_requested
from pipeline.runtime.transfer import HostBuffers
from pipeline.store import format as fmt
from pipeline.store.limits import FEWEST_HELDOUT
from pipeline.store.order import Filled, Order
from pipeline.store.reader import ActivationStore
from pipeline.store.ring import Ring, RingReader

BATCHES_AHEAD = 1
"""Finished batches in the queue, besides the one being made."""
SECONDS_BETWEEN_LOOKS = 0.5
"""Pause between checks, while no batch comes, whether the caller is to stop."""

T = TypeVar("T")
Loaded = tuple[torch.Tensor, npt.NDArray[np.int64]]
"""A buffer [R, D], and the numbers of its rows in the order in which they are taken."""


def split_shards(store: ActivationStore, heldout: int, within: int | None = None) -> tuple[list[int], list[int]]:
    """Shards to train on, and the last `heldout` shards of the first `within` rows, by default of all, which are held out.

    Raises BadInputError when nothing is left to train on, and for fewer than FEWEST_HELDOUT held-out rows.
    """
    shards, size = store.every_shard, store.layout.shard_rows
    check_heldout([store.rows_of([shard]) for shard in shards], size, heldout, within)
    return split(shards, size, heldout, within)


def split(shards: Sequence[int], shard_rows: int, heldout: int, within: int | None) -> tuple[list[int], list[int]]:
    """What `split_shards` returns, of these shards."""
    stop = _held_until(len(shards), shard_rows, within)
    return [*shards[: stop - heldout], *shards[stop:]], list(shards[stop - heldout : stop])


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


def scale_of(store: ActivationStore, layer: int, shards: Sequence[int], window_shards: int | None) -> float:
    """The factor of a stream of these shards: it makes E||x||^2 = 1 over the store or, with windows, over the first of them.

    A stream's rows have no norms before they are made, and nobody wants a pass for nothing but their mean.
    """
    return store.scale(layer, None if window_shards is None else shards[:window_shards])


def shuffled_batches(
    store: ActivationStore,
    layer: int,
    shards: Sequence[int],
    *,
    batch_size: int,
    buffer_chunks: int,
    seed: int,
    window_shards: int | None = None,
    start: int = 0,
    stop: int | None = None,
    ring: Ring | None = None,
    device: torch.device = CPU,
) -> Generator[torch.Tensor, None, None]:
    """Float32 batches [B, D] on a device, scaled by `scale_of`, from number `start` on: endlessly, or those before `stop`.

    Every row comes once per pass over the shards. The order depends only on `seed`, the pass and the store, so the number of
    batches taken is enough to resume a stream. Threads read ahead of the caller and hold two buffers in the store's dtype
    and BATCHES_AHEAD batches; closing the iterator stops them. Shards that the store does not keep come from `ring`. Raises
    BadInputError for fewer rows than one batch.
    """
    chunks = {shard: store.chunks([shard]) for shard in shards}
    order = Order(chunks=chunks, buffer_chunks=buffer_chunks, seed=seed, window_shards=window_shards)
    if order.rows < batch_size:
        raise BadInputError(f"train.batch_size {batch_size} is more than the {order.rows} rows to train on; lower it")
    scale = scale_of(store, layer, shards, window_shards)
    span = start * batch_size, math.inf if stop is None else stop * batch_size
    reader = ring.reader(f"{seed}", order.shards(*span)) if ring else None
    loaded = _loaded(reader or store, layer, order.filled(*span), order.largest)
    shape, dtype = (batch_size, store.layout.d_in), fmt.BITS[store.layout.dtype].torch_dtype
    batches = _on_device(loaded, shape, dtype, scale, device, reader.stop if reader else None)
    return _while_filling(reader, batches) if reader else batches


def _on_device(
    loaded: Iterator[Loaded],
    shape: tuple[int, int],
    dtype: torch.dtype,
    scale: float,
    device: torch.device,
    give_up: Callable[[], None] | None,
) -> Generator[torch.Tensor, None, None]:
    if device.type == "cpu":
        one = HostBuffers(1, shape, dtype, device)
        # A copy also of float32 rows, because the buffer is filled again.
        return ahead((batch_BD.to(torch.float32, copy=True).mul_(scale) for batch_BD in _gathered(loaded, one)), give_up)
    # One that is filled, those in the queue, one that is taken from it, and one whose copy is still under way.
    some = HostBuffers(BATCHES_AHEAD + 3, shape, dtype, device)
    return _sent(ahead(_gathered(loaded, some), give_up), some, scale)


def _while_filling(reader: RingReader, batches: Iterator[torch.Tensor]) -> Generator[torch.Tensor, None, None]:
    """The batches, while the reader makes the rows that they are of."""
    with reader:
        yield from batches


def rows_in_order(store: ActivationStore, layer: int, shards: Sequence[int]) -> Iterator[torch.Tensor]:
    """The rows of some shards in stored order, chunk by chunk: float32 [B, D], unscaled."""
    return (store.read(layer, start, stop).float() for start, stop in store.chunks(shards))


def _gathered(loaded: Iterator[Loaded], buffers: HostBuffers) -> Generator[torch.Tensor, None, None]:
    """Batches in the store's dtype, unscaled, each in the next of the buffers."""
    batch, filled = buffers.next(), 0
    for buffer_RD, rows_R in loaded:
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
    source: ActivationStore | RingReader, layer: int, order: Iterator[Filled], largest: int
) -> Generator[Loaded, None, None]:
    """Each buffer and the order of its rows; the next buffer is filled in the meantime."""
    layout = source.layout
    memory = [torch.empty(largest, layout.d_in, dtype=fmt.BITS[layout.dtype].torch_dtype) for _ in range(2)]
    with ThreadPoolExecutor(source.storage.parallel_reads) as pool:

        def fill(buffer_RD: torch.Tensor, one: Filled) -> list[Future[torch.Tensor]]:
            if isinstance(source, RingReader):
                source.enter(one.window)
            filling: list[Future[torch.Tensor]] = []
            filled = 0
            for start, stop in one.chunks:
                part_RD = buffer_RD[filled : filled + stop - start]
                filling.append(pool.submit(source.read, layer, start, stop, part_RD))
                filled += len(part_RD)
            return filling

        one, turn = next(order, None), 0
        filling = fill(memory[turn], one) if one else []
        while one:
            following = next(order, None)
            for part in filling:
                part.result()
            # All of the last window is read by now, if the next buffer is of another.
            filling = fill(memory[1 - turn], following) if following else []
            yield memory[turn], one.order()
            one, turn = following, 1 - turn


def ahead(batches: Generator[T, None, None], give_up: Callable[[], None] | None = None) -> Generator[T, None, None]:
    """The same batches, made by a thread while the caller works. Closing the iterator ends the thread.

    They end where the caller is asked to stop (`pipeline.runtime.interrupt`) and the next batch is not there. `give_up` then
    says to what the thread may be waiting for that nobody wants a batch any more.
    """
    queue: Queue[T | BaseException | None] = Queue(BATCHES_AHEAD)
    """Batches, then an error or, at the end, None."""
    stopped, request = Event(), stop_requested()

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
            try:
                item = queue.get(timeout=SECONDS_BETWEEN_LOOKS)
            except Empty:
                if request.is_set():
                    return
                continue
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        if give_up:
            give_up()
        thread.join()
