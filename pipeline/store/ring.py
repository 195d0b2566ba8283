"""The shards of a stream: made when they are needed, by whoever needs them, and on disk only as long as somebody does.

Any number of readers share a ring, in one process each. A reader needs the shards of the window that it reads and of the
next one. It makes those that nobody has made or claimed, in a thread, and says in a file which it needs; a shard that no
living reader needs is removed. Readers of one order stay within one window of each other, so that each shard is made once
for all of them. See docs/store-format.md, "Streams".
"""

import json
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, Self
from uuid import uuid4

import torch

from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import CorruptArtefactError, InterruptedRunError
from pipeline.store import format as fmt
from pipeline.store.commits import commit_name
from pipeline.store.reader import ActivationStore
from pipeline.store.text_arrays import REMEDY
from pipeline.store.writer import ShardWriter

TOGETHER = 3
"""Windows by which a reader may be behind others that wait for it. One further behind goes alone."""
SECONDS_BETWEEN_LOOKS = 0.1
PATIENCE = 60.0
"""Seconds without a reader after which `dasae feed` ends: cohorts follow each other faster."""
READERS = "readers"
HELPERS = ""
"""Order of those who make shards and read none."""

Maker = Callable[[int], fmt.ShardRows]
"""Makes the rows of a shard, by its number. The result depends on nothing else."""


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Where the shards of a stream are made and read. They lie on this machine, also those of a store that is elsewhere."""

    artefact: Artefact
    """The store that keeps some shards of the stream."""
    workspace: Workspace
    store: ActivationStore
    make: Maker

    def reader(self, order: str, windows: Iterator[tuple[int, list[int]]]) -> "RingReader":
        """A reader of windows, each by its number, with the shards that are read of it. Equal orders have equal windows."""
        return RingReader(self, order, windows)

    def feed(self, patience: float) -> int:
        """Make shards for readers, until there has been none for `patience` seconds. Returns how many were made."""
        made, last_seen = 0, time.monotonic()
        with _Helper(self) as helper:
            writer = ShardWriter(helper.storage)
            while time.monotonic() - last_seen < patience:
                readers = [state for state in helper.others() if state["order"] != HELPERS]
                if readers:
                    last_seen = time.monotonic()
                if helper.make_one(writer, [shard for state in readers for shard in state["shards"]]):
                    made += 1
                else:
                    time.sleep(SECONDS_BETWEEN_LOOKS)
        return made


class _Member:
    """Whoever makes shards of a ring: a context manager, inside which others know of it."""

    def __init__(self, ring: Ring, order: str, window: int = 0, shards: Collection[int] = ()):
        self.ring, self.order, self.window = ring, order, window
        self.first = shards
        """Shards that are needed from the start."""
        self.storage = ring.workspace.ring(ring.artefact)
        self.layout = ring.store.layout
        self.id = uuid4().hex
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self._claimed(f"reader-{self.id}"))
            stack.callback(self._leave)
            with self._turn():
                self._lay_out()
                self._say(self.window, self.first)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def others(self) -> list[dict[str, Any]]:
        """What the other living members said last."""
        with self._turn():
            return list(self._others())

    def make_one(self, writer: ShardWriter, shards: Collection[int]) -> bool:
        """Make the first of some shards that nobody has made or claimed; False if there is none."""
        for shard in shards:
            if self._there(writer, shard):
                continue
            with self._claimed(f"ring-{shard}") as mine:
                if mine and not self._there(writer, shard) and self._made_now(writer, shard):
                    return True
        return False

    def _made_now(self, writer: ShardWriter, shard: int) -> bool:
        writer.write(shard, self.ring.make(shard))
        return True

    def _there(self, writer: ShardWriter, shard: int) -> bool:
        return shard in self.ring.store.commits or writer.committed(shard)

    def _say(self, window: int, shards: Collection[int]) -> None:
        state = {"order": self.order, "window": window, "shards": sorted(shards)}
        self.storage.write(f"{READERS}/{self.id}.json", json.dumps(state).encode())

    def _others(self) -> Iterator[dict[str, Any]]:
        """What the other living members said last. The files of dead ones are removed."""
        for name in self.storage.sizes(READERS):
            member = name.removeprefix(f"{READERS}/").removesuffix(".json")
            if member == self.id:
                continue
            with self._claimed(f"reader-{member}") as dead:
                if dead:
                    self.storage.delete(name)
                else:
                    yield json.loads(self.storage.read(name))

    def _sweep(self, needed: Collection[int]) -> None:
        """Remove the shards that are not needed, and what killed writers left."""
        self.storage.sweep()
        there = self.storage.sizes()
        for shard in (shard for shard in range(self.layout.shards) if shard not in needed):
            for name in (commit_name(shard), *fmt.shard_files(self.layout, shard)):  # a record never outlives its files
                if name in there:
                    self.storage.delete(name)

    def _lay_out(self) -> None:
        """Make the ring, unless others live in it. What dead ones left was not synced, so nobody can trust it."""
        if not list(self._others()):
            self.ring.workspace.discard_ring(self.ring.artefact)
            fmt.lay_out(self.storage, self.layout.model_copy(update={"kept": None}), {})

    def _leave(self) -> None:
        """With the last member, remove the ring. What only this one needed, others remove, or take if they need it next."""
        with self._turn():
            self.storage.delete(f"{READERS}/{self.id}.json")
            if not list(self._others()):
                self.ring.workspace.discard_ring(self.ring.artefact)

    def _claimed(self, part: str) -> AbstractContextManager[bool]:
        return self.ring.workspace.claim(self.ring.artefact, part, here=True)

    def _turn(self) -> AbstractContextManager[None]:
        return self.ring.workspace.turn(self.ring.artefact, "ring")


class _Helper(_Member):
    """One who makes shards for others."""

    def __init__(self, ring: Ring):
        super().__init__(ring, HELPERS)

    def _made_now(self, writer: ShardWriter, shard: int) -> bool:
        with self._turn():  # readers may have gone on since they were asked
            wanted = any(shard in other["shards"] for other in self._others())
            self._say(self.window, [shard] if wanted else ())
        return wanted and super()._made_now(writer, shard)


class RingReader(_Member):
    """A reader of a ring. Inside the context, `enter` each window before reading from it, in their order."""

    def __init__(self, ring: Ring, order: str, windows: Iterator[tuple[int, list[int]]]):
        self._windows, self._next = windows, next(windows, None)
        window, shards = self._next or (0, [])
        super().__init__(ring, order, window, shards)
        self._stopped = threading.Event()
        self._changed = threading.Condition()
        self._entered = -1
        """The window that is to be read."""
        self._at = -1
        """The window whose shards this reader needs."""
        self._made: ActivationStore | None = None
        """The ring as it was when that window was begun, and what was committed since."""
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ring", daemon=True)

    def __enter__(self) -> Self:
        super().__enter__()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
        self._thread.join()
        # MKL has one number of threads for the whole process, and the thread has set it.
        torch.set_num_threads(torch.get_num_threads())
        super().__exit__(*error)

    def stop(self) -> None:
        """Ask the thread to end after the shard in hand, and whoever waits for rows to give up. Any thread may call this."""
        self._stopped.set()
        self._notify()

    def enter(self, window: int) -> None:
        """Go on to a window: everything of the last one is read."""
        self._entered = max(self._entered, window)
        self._notify()

    def read(self, layer: int, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Rows `start` to `stop` - 1 of a shard of the window that was entered, as `ActivationStore.read` returns them.

        Waits until the shard is made. Raises what made it fail, and InterruptedRunError after `stop`.
        """
        shard = start // self.layout.shard_rows
        if shard in self.ring.store.commits:
            return self.ring.store.read(layer, start, stop, out)
        made = self._with(shard)
        try:
            return made.read(layer, start, stop, out)
        except CorruptArtefactError as error:
            what = str(error).removesuffix(REMEDY)
            raise CorruptArtefactError(f"{what}run the same command again, which makes it again") from None

    def _with(self, shard: int) -> ActivationStore:
        """The ring, once it has a shard."""
        while True:
            with self._changed:
                if self._error:
                    raise self._error
                if self._stopped.is_set():
                    raise InterruptedRunError("the stream was closed")
                if self._made and self._at == self._entered and self._made.has(shard):
                    return self._made
                self._changed.wait(SECONDS_BETWEEN_LOOKS)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # From here on, in the reader's thread.

    def _run(self) -> None:
        try:
            # As in training on a CPU, so that sums do not depend on the number of cores.
            torch.set_num_threads(1)
            writer = ShardWriter(self.storage)
            while self._next:
                number, shards = self._next
                self._next = next(self._windows, None)
                self._wait(lambda number=number: self._entered >= number and not self._behind(number - 1))
                self._need(number, shards)
                self._fill(writer, shards)
                # Only now, or there would be three windows on disk while those that are behind read the last one.
                self._wait(lambda number=number: self._entered > number or not self._behind(number))
                if self._next and self._entered == number:
                    self._need(number, [*shards, *self._next[1]])
                    self._fill(writer, self._next[1])
                if self._stopped.is_set():
                    return
        except BaseException as error:
            self._error = error
            self._notify()

    def _wait(self, until: Callable[[], bool]) -> None:
        while not self._stopped.is_set() and not until():
            with self._changed:
                self._changed.wait(SECONDS_BETWEEN_LOOKS)

    def _fill(self, writer: ShardWriter, shards: Collection[int]) -> None:
        """Make shards that nobody has made or claimed, until all are there or the reader goes on."""
        while not self._stopped.is_set() and self._entered <= self._at:
            if self.make_one(writer, shards):
                self._notify()
            elif all(self._there(writer, shard) for shard in shards):
                return
            else:
                self._stopped.wait(SECONDS_BETWEEN_LOOKS)

    def _behind(self, number: int) -> bool:
        """Whether a living reader of this order is before a window, and near enough to be waited for."""
        return any(state["order"] == self.order and 0 < number - state["window"] <= TOGETHER for state in self.others())

    def _need(self, number: int, shards: Collection[int]) -> None:
        """Say which shards this reader needs from now on, remove those that nobody needs, and look at the ring anew."""
        if self._stopped.is_set():
            return
        with self._turn():
            self._say(number, shards)
            self._sweep({*shards, *(shard for other in self._others() for shard in other["shards"])})
            made = ActivationStore(self.storage, partial=True)
        self._at, self._made = number, made
        self._notify()
