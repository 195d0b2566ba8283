"""The stream of batches: every row once a pass, the same from any place on, and its threads end with it."""

import threading
from collections import Counter
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretend_gpu import PretendedGpu
from small_store import SHARD_ROWS, filled, flipped, numbered, numbers

from pipeline.errors import CorruptArtefactError
from pipeline.store.batches import ahead, rows_in_order, shuffled_batches
from pipeline.store.reader import ActivationStore


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[int, ActivationStore]:
    """Stores of 1 to 4 shards, the last one with a row less per shard."""
    folder = tmp_path_factory.mktemp("stores")
    return {shards: filled(folder / str(shards), numbered(shards * SHARD_ROWS - shards)) for shards in range(1, 5)}


@settings(max_examples=25)
@given(
    shards=st.integers(1, 4),
    batch_size=st.integers(1, 40),
    buffer_chunks=st.integers(1, 20),
    seed=st.integers(0, 3),
    start=st.integers(0, 30),
)
def test_every_row_once_a_pass_and_the_same_from_any_batch_on(
    stores: dict[int, ActivationStore], shards: int, batch_size: int, buffer_chunks: int, seed: int, start: int
) -> None:
    store = stores[shards]

    def stream(first: int, count: int) -> list[torch.Tensor]:
        batches = shuffled_batches(
            store, 3, store.shards, batch_size=batch_size, buffer_chunks=buffer_chunks, seed=seed, start=first
        )
        return list(islice(batches, count))

    two_passes = 2 * store.rows // batch_size
    whole = stream(0, two_passes)
    assert all(batch_BD.shape == (batch_size, 8) and batch_BD.dtype == torch.float32 for batch_BD in whole)
    seen = [number for batch_BD in whole for number in numbers(batch_BD, store.scale(3))]
    # The last batch of two passes may end short of the second one's end.
    assert Counter(seen[: store.rows]) == Counter(range(store.rows))
    assert max(Counter(seen[store.rows :]).values(), default=1) == 1
    start = min(start, two_passes)
    tail = stream(start, two_passes - start)
    assert all(torch.equal(one, other) for one, other in zip(whole[start:], tail, strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_batches_that_are_kept_stay_as_they_were_and_are_the_same_on_a_gpu(tmp_path: Path, dtype: str) -> None:
    values_RD = numbered(4 * SHARD_ROWS).to(getattr(torch, dtype))
    store = filled(tmp_path / "s", values_RD, dtype=dtype)
    stream = partial(shuffled_batches, store, 3, store.shards, batch_size=16, buffer_chunks=6, seed=1)
    batches = list(islice(stream(), 16))
    assert Counter(number for batch_BD in batches for number in numbers(batch_BD, store.scale(3))) == Counter(
        range(store.rows)
    )
    with PretendedGpu() as gpu:
        there = list(islice(stream(device=torch.device("cuda")), 16))
        assert {str(batch_BD.device) for batch_BD in there} == {"cuda:0"}
        assert not gpu.waits
        assert all(torch.equal(one.cpu(), other) for one, other in zip(there, batches, strict=True))


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith(("batches", "ThreadPoolExecutor"))}


def test_what_ends_ends_ahead_too() -> None:
    assert list(ahead(number for number in range(5))) == [0, 1, 2, 3, 4]


def test_closing_the_stream_stops_its_threads(stores: dict[int, ActivationStore]) -> None:
    before = threads()
    batches = shuffled_batches(stores[4], 3, [0, 1, 2, 3], batch_size=4, buffer_chunks=2, seed=0)
    next(batches)
    assert threads() - before
    batches.close()
    assert not threads() - before


@pytest.mark.parametrize("after", [0, 3])
def test_damage_found_by_a_reading_thread_reaches_the_caller(tmp_path: Path, after: int) -> None:
    before = threads()
    filled(tmp_path / "s", numbered(4 * SHARD_ROWS))
    flipped(tmp_path / "s/layer_03/c/2/0")
    batches = shuffled_batches(ActivationStore(tmp_path / "s"), 3, [0, 1, 2, 3], batch_size=4, buffer_chunks=1, seed=after)
    with pytest.raises(CorruptArtefactError, match="layer_03/c/2/0: chunk 0 does not match its checksum; repair it with"):
        for _ in islice(batches, 65):
            pass
    assert not threads() - before


def test_shards_with_fewer_rows_than_their_range_are_read_right(tmp_path: Path) -> None:
    """As they are where massive rows were left out."""
    kept = {0: 64, 1: 50, 2: 33, 3: 20}
    values_RD = numbered(4 * SHARD_ROWS - 10)
    store = filled(tmp_path / "s", values_RD, kept=kept)
    assert store.rows == sum(kept.values())
    expected = [row for shard, count in kept.items() for row in range(shard * SHARD_ROWS, shard * SHARD_ROWS + count)]
    assert numbers(torch.cat(list(rows_in_order(store, 3, store.shards)))) == expected
    batches = list(islice(shuffled_batches(store, 3, store.shards, batch_size=1, buffer_chunks=5, seed=0), store.rows))
    assert sorted(numbers(torch.cat(batches), store.scale(3))) == expected
    assert (store.read_field("position", 64, 64 + 50) == range(64, 114)).all()
    with pytest.raises(IndexError, match="rows 128 to 192 were not written"):
        store.read(3, 128, 192)
