"""Fills one store: repairs damage, claims shards among several processes, commits them, publishes the manifest."""

import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial

from pipeline.artefacts.identity import key_of
from pipeline.artefacts.manifest import MANIFEST, Artefact
from pipeline.artefacts.storage import Storage
from pipeline.artefacts.workspace import RING, Workspace
from pipeline.errors import BadInputError, CorruptArtefactError, InterruptedRunError
from pipeline.runtime.interrupt import stop_on_signal
from pipeline.runtime.progress import Advance, progress
from pipeline.store import format as fmt
from pipeline.store.commits import commit_name
from pipeline.store.format import ShardRows
from pipeline.store.norms import massive_rows, store_facts
from pipeline.store.reader import ActivationStore
from pipeline.store.verify import check_text, damages
from pipeline.store.writer import InPlace, ShardWriter

SECONDS_BETWEEN_LOOKS = 0.5
"""Pause between checks whether other processes have finished their shards."""


def mend(artefact: Artefact, workspace: Workspace, *, deep: bool = False) -> bool:
    """Discard what is damaged in a store, so that it is made again; True if the store is finished and undamaged.

    Call this with the store's lock held. With `deep`, every checksum is compared. Raises BadInputError when the folder holds
    another unfinished store.
    """
    storage = workspace.storage(artefact)
    try:
        finished = workspace.manifest(artefact) is not None
        if not finished:
            _refuse_another(artefact, storage)
    except CorruptArtefactError:
        finished = False
    if not fmt.is_laid_out(storage):
        workspace.reopen(artefact)
        return False
    found = damages(storage, deep=deep)
    for damage in found:
        print(f"repairing {storage}: {damage}", file=sys.stderr)
        if damage.shard is not None:
            storage.delete(commit_name(damage.shard))
        elif damage.file != MANIFEST:
            # Without its root, the layout is written anew. It has the same bytes, so committed shards stay valid.
            storage.delete(fmt.ROOT)
    if found:
        # Last: were this process killed before, the manifest would still tell the damage that is left.
        workspace.reopen(artefact)
    return finished and not found


@dataclass(kw_only=True)
class Filling:
    """The shards of a store that this process fills, claimed one at a time. `filling` opens it."""

    artefact: Artefact
    workspace: Workspace
    writer: ShardWriter
    wanted: Sequence[int]
    advance: Advance
    stop: threading.Event
    pool: Executor
    claim: ExitStack
    """Holds the claim on the shard in hand."""
    writers: int
    """Shards that are written at the same time."""
    writing: deque[Future[None]] = field(default_factory=deque[Future[None]])
    """Each ends when a shard that was handed over is written, in that order."""

    def claimed(self) -> Iterator[int]:
        """Claim the wanted shards and yield those that are not committed, until all are, by this process or by others.

        Each is looked up by itself, once: a listing of the store would be of as many files as it has shards.

        Raises InterruptedRunError after SIGTERM, when the shard in hand is committed.
        """
        waiting = self._in_turn()
        while waiting:
            held: list[int] = []  # by other processes, which may die
            for shard in waiting:
                claimed = self.claim.enter_context(self.workspace.claim(self.artefact, str(shard)))
                if not claimed:
                    held.append(shard)
                elif not self.writer.committed(shard):
                    yield shard
                self.claim.close()
                if self.stop.is_set():
                    break
            self._wait_until_written()
            if self.stop.is_set():
                raise InterruptedRunError(f"stopped on request; {self.artefact.label} goes on with the same command")
            if len(held) == len(waiting):
                time.sleep(SECONDS_BETWEEN_LOOKS)
            waiting = held

    def commit(self, shard: int, rows: ShardRows, there: Mapping[int, InPlace] | None = None) -> None:
        """Write and commit a claimed shard in the background, while the model computes the next ones."""
        self._wait_until_written(but=self.writers - 1)
        self.writing.append(self.pool.submit(self._write, self.claim.pop_all(), shard, rows, there))
        self.advance(self.writer.layout.shard_rows)

    def _in_turn(self) -> list[int]:
        """The wanted shards. On an object store each machine begins at another, so that few ask for what others have."""
        turn = secrets.randbelow(len(self.wanted)) if self.wanted and self.workspace.remote else 0
        return [*self.wanted[turn:], *self.wanted[:turn]]

    def _write(self, claim: ExitStack, shard: int, rows: ShardRows, there: Mapping[int, InPlace] | None) -> None:
        with claim:
            assured = partial(self.workspace.assure_claim, self.artefact, str(shard))
            self.writer.write(shard, rows, there, assured=assured)

    def _wait_until_written(self, but: int = 0) -> None:
        """Wait for the shards handed over, `but` the last so many."""
        while len(self.writing) > but:
            self.writing.popleft().result()


@contextmanager
def filling(
    artefact: Artefact, workspace: Workspace, writer: ShardWriter, shards: Sequence[int], writers: int = 1
) -> Generator[Filling]:
    """Fill missing shards of a laid-out store. Any number of processes may do this at once and divide the shards.

    `writers` shards are written at a time, each in a thread. In the block, take shards from `claimed` and hand the rows of
    each to `commit`. It traps SIGTERM and Ctrl-C.
    """
    with (
        progress(f"extract {artefact.label}", len(shards) * writer.layout.shard_rows, "tokens") as advance,
        stop_on_signal() as stop,
        ThreadPoolExecutor(writers) as pool,
        ExitStack() as claim,
    ):
        yield Filling(
            artefact=artefact,
            workspace=workspace,
            writer=writer,
            wanted=shards,
            advance=advance,
            stop=stop,
            pool=pool,
            claim=claim,
            writers=writers,
        )


def publish(artefact: Artefact, workspace: Workspace, seconds: float) -> None:
    """Write the manifest of a store whose shards are all committed, unless it is there; `seconds` is what the store took."""
    with workspace.lock(artefact):
        if workspace.manifest(artefact) is None:
            _publish(artefact, workspace, seconds)


def _refuse_another(artefact: Artefact, storage: Storage) -> None:
    if fmt.is_laid_out(storage) and (key := key_of(fmt.read_layout(storage).provenance)) != artefact.key:
        raise BadInputError(f"{storage} holds the unfinished artefact {key}, not this one; move it away and run again")


def _publish(artefact: Artefact, workspace: Workspace, seconds: float) -> None:
    storage = workspace.storage(artefact)
    storage.sweep()
    store = ActivationStore(storage)
    check_text(storage)  # the manifest would record damaged bytes as right
    shard_data = {name for commit in store.commits.values() for name in commit.files}
    names = [name for name in storage.sizes() if name not in shard_data and not name.startswith(f"{RING}/")]
    facts = store_facts(store.layout, store.commits)
    workspace.publish(
        artefact,
        # The commits carry a checksum of every shard; the manifest carries one of every commit.
        files=names,
        facts={**facts, "seconds": round(seconds, 1)},
    )
    for remark in massive_rows(facts):
        print(f"{artefact.label}: {remark}", file=sys.stderr)
