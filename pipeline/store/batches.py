"""Rows of a store as a stream. Shuffled: random chunks fill a buffer, random rows of the buffer make the batches.

Shapes: B rows per batch, D d_in.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from pipeline.errors import BadInputError
from pipeline.store.reader import ActivationStore


def split_shards(store: ActivationStore, heldout: int) -> tuple[list[int], list[int]]:
    """Shards to train on and shards held out: the last `heldout` ones.

    Raises BadInputError when nothing is left to train on.
    """
    shards = list(range(store.layout.shards))
    if heldout >= len(shards):
        raise BadInputError(
            f"train.heldout_shards {heldout} leaves nothing to train on: the store has {len(shards)} shards of "
            f"{store.layout.shard_rows} rows; extract more tokens or use smaller shards"
        )
    return shards[:-heldout], shards[-heldout:]


def shuffled_batches(
    store: ActivationStore, layer: int, shards: Sequence[int], *, batch_size: int, buffer_chunks: int, seed: int
) -> Iterator[torch.Tensor]:
    """Endless float32 batches [B, D], scaled to E||x||^2 = 1; every row once per pass, in an order that `seed` decides.

    Rows left over at the end of a buffer go into the next one, so that none is lost within a pass.
    """
    chunks = [bounds for shard in shards for bounds in _chunk_bounds(store, shard)]
    if sum(stop - start for start, stop in chunks) < batch_size:
        raise BadInputError(f"train.batch_size {batch_size} is more than the rows there are to train on")
    scale = store.scale(layer)
    rng = np.random.default_rng(seed)
    left_over_RD = torch.empty(0, store.layout.d_in)
    while True:
        order = rng.permutation(len(chunks))
        for first in range(0, len(order), buffer_chunks):
            picked = [chunks[index] for index in order[first : first + buffer_chunks]]
            rows = [store.read(layer, start, stop).float() for start, stop in picked]
            fresh_RD = torch.cat(rows).mul_(scale)
            buffer_RD = torch.cat([left_over_RD, fresh_RD[torch.from_numpy(rng.permutation(len(fresh_RD)))]])
            whole = len(buffer_RD) // batch_size * batch_size
            for start in range(0, whole, batch_size):
                yield buffer_RD[start : start + batch_size]
            left_over_RD = buffer_RD[whole:]


def rows_in_order(store: ActivationStore, layer: int, shards: Sequence[int]) -> Iterator[torch.Tensor]:
    """The rows of some shards as they lie, chunk by chunk: float32 [B, D], unscaled."""
    for shard in shards:
        for start, stop in _chunk_bounds(store, shard):
            yield store.read(layer, start, stop).float()


def _chunk_bounds(store: ActivationStore, shard: int) -> list[tuple[int, int]]:
    start, stop = store.layout.shard_range(shard)
    size = store.layout.chunk_rows
    return [(first, min(first + size, stop)) for first in range(start, stop, size)]
