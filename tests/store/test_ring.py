"""The ring of a stream: what is on disk at any time, who makes what, and what is left behind."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

import pytest
import torch
from small_store import CHUNK_ROWS, D_IN, SHARD_ROWS, flipped, new_store, numbered, shard_rows

from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.storage import LocalStorage
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import CorruptArtefactError, PipelineError
from pipeline.store import format as fmt
from pipeline.store.commits import commit_name
from pipeline.store.order import Order
from pipeline.store.reader import ActivationStore
from pipeline.store.ring import Ring, RingReader
from pipeline.store.writer import ShardWriter

SHARDS, WINDOW, KEPT = 12, 2, (0, 1)
VALUES_RD = numbered(SHARDS * SHARD_ROWS)
STORE = Artefact(kind="stores", label="small", inputs={})


class Streamed:
    """A store that keeps two of twelve shards, and a ring for the others."""

    def __init__(self, folder: Path) -> None:
        self.workspace = Workspace(folder)
        storage = self.workspace.storage(STORE)
        fmt.create(storage, new_store(len(VALUES_RD), kept=KEPT))
        for shard in KEPT:
            ShardWriter(storage).write(shard, self.rows(shard))
        self.store = ActivationStore(storage)
        self.made = Counter[int]()
        self.on_disk: list[int] = []
        """Shards in the ring, each time that one is made."""
        self.folder = self.workspace.ring(STORE)

    @staticmethod
    def rows(shard: int) -> fmt.ShardRows:
        start = shard * SHARD_ROWS
        return shard_rows(VALUES_RD[start : start + SHARD_ROWS], start)

    def make(self, shard: int) -> fmt.ShardRows:
        self.made[shard] += 1
        self.on_disk.append(len(self.folder.sizes(fmt.COMMITS)) + 1)
        return self.rows(shard)

    def reader(
        self, row: int = 0, stop: int = len(VALUES_RD), seed: int = 0, make: Callable[[int], fmt.ShardRows] | None = None
    ) -> tuple[Order, RingReader]:
        chunks = {shard: self.store.chunks([shard]) for shard in range(SHARDS)}
        order = Order(chunks=chunks, buffer_chunks=2, seed=seed, window_shards=WINDOW)
        ring = Ring(artefact=STORE, workspace=self.workspace, store=self.store, make=make or self.make)
        return order, ring.reader(f"{seed}", order.shards(row, stop))

    def read(
        self, row: int = 0, stop: int = len(VALUES_RD), seed: int = 0, pause: Callable[[], float] = lambda: 0.0
    ) -> None:
        """Read a stream, and compare its rows with what they should be."""
        order, reader = self.reader(row, stop, seed)
        with reader:
            self.compare(order, reader, row, stop, pause)

    @staticmethod
    def compare(order: Order, reader: RingReader, row: int, stop: int, pause: Callable[[], float] = lambda: 0.0) -> None:
        for one in order.filled(row, stop):
            reader.enter(one.window)
            for start, end in one.chunks:
                out = torch.empty(end - start, D_IN, dtype=torch.bfloat16)
                assert torch.equal(reader.read(3, start, end, out), VALUES_RD[start:end])
            time.sleep(pause())


@pytest.fixture
def streamed(tmp_path: Path) -> Streamed:
    return Streamed(tmp_path)


def in_threads(calls: Sequence[Callable[[], None]]) -> None:
    """Call each in a thread, and raise what one raised. Locks keep threads apart as they do processes."""
    errors: list[BaseException] = []

    def run(call: Callable[[], None]) -> None:
        try:
            call()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    for error in errors:
        raise error


def test_one_reader_has_two_windows_on_disk_makes_each_shard_once_and_leaves_nothing(streamed: Streamed) -> None:
    streamed.read()
    assert streamed.made == Counter(range(len(KEPT), SHARDS))
    assert max(streamed.on_disk) <= 2 * WINDOW
    assert not streamed.folder.root.exists()


def test_a_part_of_a_stream_takes_only_its_shards(streamed: Streamed) -> None:
    order, _ = streamed.reader()
    row, stop = 5 * SHARD_ROWS + 3, 6 * SHARD_ROWS
    needed = {shard for _, shards in order.shards(row, stop) for shard in shards}
    streamed.read(row, stop)
    assert set(streamed.made) == needed - set(KEPT)
    assert len(needed) <= WINDOW


@pytest.mark.parametrize("seed", range(3))
def test_readers_that_begin_together_make_each_shard_once_between_them(streamed: Streamed, seed: int) -> None:
    together = threading.Barrier(3)

    def one(number: int) -> None:
        speed, (order, reader) = Random(10 * seed + number), streamed.reader()
        with reader:
            together.wait()
            streamed.compare(order, reader, 0, len(VALUES_RD), lambda: speed.random() * (0.02, 0.001, 0.005)[number])

    in_threads([lambda number=number: one(number) for number in range(3)])
    assert streamed.made == Counter(range(len(KEPT), SHARDS))
    assert max(streamed.on_disk) <= 2 * WINDOW
    assert not streamed.folder.root.exists()


def test_one_that_joins_late_or_reads_in_another_order_blocks_nobody(streamed: Streamed) -> None:
    stop, slow = len(VALUES_RD), lambda: 0.005
    in_threads([
        lambda: streamed.read(4 * WINDOW * SHARD_ROWS, stop, pause=slow),
        lambda: streamed.read(pause=slow),
        lambda: streamed.read(seed=1, pause=slow),
    ])  # fmt: skip
    assert max(streamed.on_disk) <= 3 * 2 * WINDOW
    assert not streamed.folder.root.exists()


def test_what_killed_readers_left_is_not_waited_for_and_removed(streamed: Streamed) -> None:
    order, reader = streamed.reader()
    with reader:
        streamed.compare(order, reader, 0, 10)
        streamed.workspace.ring(STORE).write("readers/dead.json", b'{"order": "0", "window": 1, "shards": [2, 3, 4, 5]}')
        writer = ShardWriter(streamed.folder)
        unneeded = max(set(range(SHARDS)) - {shard for _, shards in order.shards(0, 200) for shard in shards})
        writer.write(unneeded, streamed.rows(unneeded))
        streamed.compare(order, reader, 10, 4 * WINDOW * SHARD_ROWS)
        assert not streamed.folder.size("readers/dead.json")
    assert not streamed.folder.root.exists()


def test_what_others_left_is_not_used(streamed: Streamed) -> None:
    other = streamed.store.layout.model_copy(update={"kept": None, "seed": 7})
    fmt.lay_out(streamed.folder, other, {})
    for shard in range(2, 6):
        ShardWriter(streamed.folder).write(shard, streamed.rows(shard))
    streamed.read()
    assert streamed.made == Counter(range(len(KEPT), SHARDS))


def test_others_make_shards_beside_the_readers_and_end_after_them(streamed: Streamed) -> None:
    helped, made = threading.Event(), list[int]()

    def slowly(shard: int) -> fmt.ShardRows:
        assert helped.wait(30)
        return streamed.make(shard)

    def helping(shard: int) -> fmt.ShardRows:
        helped.set()
        return streamed.make(shard)

    ring = Ring(artefact=STORE, workspace=streamed.workspace, store=streamed.store, make=helping)
    order, reader = streamed.reader(make=slowly)
    helpers = [threading.Thread(target=lambda: made.append(ring.feed(0.3))) for _ in range(2)]
    with reader:
        for helper in helpers:
            helper.start()
        streamed.compare(order, reader, 0, len(VALUES_RD))
    for helper in helpers:
        helper.join(60)
    assert streamed.made == Counter(range(len(KEPT), SHARDS))
    assert sum(made) > 0
    assert not streamed.folder.root.exists()


def test_a_damaged_shard_is_an_error_that_the_next_run_mends(streamed: Streamed) -> None:
    order, reader = streamed.reader(0, WINDOW * SHARD_ROWS)
    ((_, shards),) = order.shards(0, WINDOW * SHARD_ROWS)
    shard = next(shard for shard in shards if shard not in KEPT)
    out = torch.empty(CHUNK_ROWS, D_IN, dtype=torch.bfloat16)
    start = shard * SHARD_ROWS
    with reader:
        reader.enter(0)
        reader.read(3, start, start + CHUNK_ROWS, out)
        flipped(streamed.folder.root / fmt.layer_file(3, shard))
        with pytest.raises(CorruptArtefactError, match="does not match its checksum; run the same command again"):
            reader.read(3, start, start + CHUNK_ROWS, out)
    streamed.read(0, WINDOW * SHARD_ROWS)


def test_an_error_of_the_maker_reaches_the_reader_and_nothing_waits_for_it(streamed: Streamed) -> None:
    def fails(shard: int) -> fmt.ShardRows:
        raise PipelineError(f"no rows of {shard}")

    order, reader = streamed.reader(make=fails)
    with reader, pytest.raises(PipelineError, match="no rows of"):
        streamed.compare(order, reader, 0, len(VALUES_RD))
    streamed.read()


def test_a_store_that_is_streamed_is_not_removed(streamed: Streamed) -> None:
    _, reader = streamed.reader()
    with reader, pytest.raises(PipelineError, match="by another process"):
        streamed.workspace.discard(STORE)
    streamed.workspace.discard(STORE)
    assert not streamed.store.storage.sizes()


def test_a_record_of_a_shard_goes_before_its_files(streamed: Streamed, monkeypatch: pytest.MonkeyPatch) -> None:
    gone: list[str] = []
    delete = LocalStorage.delete

    def noting(self: LocalStorage, name: str) -> None:
        gone.append(name)
        delete(self, name)

    monkeypatch.setattr(LocalStorage, "delete", noting)
    streamed.read()

    def places(shard: int) -> Iterator[int]:
        names = [commit_name(shard), *fmt.shard_files(streamed.store.layout, shard)]
        yield from (gone.index(name) for name in names if name in gone)

    removed = [list(places(shard)) for shard in range(SHARDS)]
    assert any(removed)
    assert all(place == sorted(place) for place in removed)
