"""The order of a stream with windows: every row once a pass, few shards at a time, and the same from any row on."""

from dataclasses import replace
from itertools import islice

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.store.order import Bounds, Order

CHUNK = 4

orders = st.builds(
    Order,
    chunks=st.lists(st.integers(1, 3 * CHUNK), min_size=1, max_size=9).map(
        lambda rows: {2 * shard: chunks(shard, count) for shard, count in enumerate(rows)}
    ),
    buffer_chunks=st.integers(1, 7),
    seed=st.integers(0, 3),
    window_shards=st.none() | st.integers(1, 11),
)


def chunks(shard: int, rows: int) -> list[Bounds]:
    """The chunks of a shard with so many rows."""
    start = 100 * shard
    return [(first, min(first + CHUNK, start + rows)) for first in range(start, start + rows, CHUNK)]


def taken(order: Order, row: int, stop: int) -> list[tuple[int, int]]:
    """The window and the number of every row from `row` to `stop` - 1 of a stream."""
    rows: list[tuple[int, int]] = []
    for one in order.filled(row, stop):
        of_buffer = [number for start, end in one.chunks for number in range(start, end)]
        rows += [(one.window, of_buffer[index]) for index in one.order()]
    return rows


@given(orders)
def test_every_row_comes_once_a_pass_and_few_shards_are_open_at_a_time(order: Order) -> None:
    every = sorted(row for of_shard in order.chunks.values() for start, stop in of_shard for row in range(start, stop))
    first, second = taken(order, 0, order.rows), taken(order, order.rows, 2 * order.rows)
    assert sorted(row for _, row in first) == sorted(row for _, row in second) == every
    windows = [window for window, _ in first + second]
    assert windows == sorted(windows)
    most = order.window_shards or len(order.chunks)
    shards_of = {window: {row // 100 for one, row in first + second if one == window} for window in windows}
    assert max(map(len, shards_of.values())) <= most
    sizes = [len(shards) for shards in shards_of.values()]
    assert max(sizes) - min(sizes) <= 1


@given(orders)
def test_without_windows_it_is_the_order_that_it_was_before_there_were_any(order: Order) -> None:
    order = replace(order, window_shards=None)
    chunks = [bounds for of_shard in order.chunks.values() for bounds in of_shard]
    expected: list[int] = []
    for done in range(2):
        shuffled = [chunks[index] for index in np.random.default_rng((order.seed, done)).permutation(len(chunks))]
        for first in range(0, len(chunks), order.buffer_chunks):
            rows = [row for start, stop in shuffled[first : first + order.buffer_chunks] for row in range(start, stop)]
            expected += [rows[index] for index in np.random.default_rng((order.seed, done, first)).permutation(len(rows))]
    assert [row for _, row in taken(order, 0, 2 * order.rows)] == expected


@given(order=orders, row=st.integers(0, 200), count=st.integers(0, 100))
def test_a_stream_can_begin_and_end_at_any_row_and_names_the_shards_that_it_reads(
    order: Order, row: int, count: int
) -> None:
    part = taken(order, row, row + count)
    assert part == taken(order, 0, row + count)[row:]
    read = {window: {2 * (number // 100) for one, number in part if one == window} for window, _ in part}
    named = {window: set(shards) for window, shards in order.shards(row, row + count)}
    assert named.keys() == read.keys()
    # All rows of a buffer are read, also where only some of them are taken.
    assert all(named[window] >= shards for window, shards in read.items())
    endless = islice(order.shards(row), len(named))
    assert [window for window, _ in endless] == list(named)
