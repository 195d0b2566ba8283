"""One store from its layout to its manifest: resumed where it was left, repaired where damaged, shared by processes."""

import secrets
import sys
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

from pipeline.artefacts.identity import key_of
from pipeline.artefacts.manifest import MANIFEST, Artefact
from pipeline.artefacts.storage import Storage
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError, CorruptArtefactError, InterruptedRunError
from pipeline.extract.shards import ShardRows
from pipeline.runtime.interrupt import stop_on_sigterm
from pipeline.runtime.progress import progress
from pipeline.store import format as fmt
from pipeline.store.reader import ActivationStore
from pipeline.store.verify import damages, store_norms
from pipeline.store.writer import ShardWriter, commit_name

SECONDS_BETWEEN_LOOKS = 0.5
"""How long to wait before looking again whether other processes have finished their shards."""

RowsOf = Callable[[int], ShardRows]


def prepare(
    artefact: Artefact, workspace: Workspace, *, new_store: Callable[[], fmt.NewStore], deep: bool = False
) -> list[int] | None:
    """Lay a store out, or mend what is there; returns the shards that are missing, None when the store is finished.

    With `deep` every checksum of what is there is compared first.
    """
    storage = workspace.storage(artefact)
    with workspace.lock(artefact):
        if _mend(artefact, workspace, deep):
            return None
        if not fmt.is_laid_out(storage):
            fmt.create(storage, new_store())
    return ShardWriter(storage).missing()


def write_shards(
    artefact: Artefact,
    workspace: Workspace,
    shards: Collection[int],
    *,
    rows_of: Callable[[fmt.Layout, fmt.Sequences], RowsOf],
) -> None:
    """Make those of some shards that are missing. Any number of processes may do this at once: they share the shards.

    `rows_of` opens what makes the rows of a shard, and is called only when one is missing. Raises InterruptedRunError after
    SIGTERM, with the shard in hand committed.
    """
    storage = workspace.storage(artefact)
    writer, wanted = ShardWriter(storage), frozenset(shards)

    def still_missing() -> list[int]:
        return [shard for shard in writer.missing() if shard in wanted]

    missing = still_missing()
    if not missing:
        return
    make_rows = rows_of(writer.layout, fmt.read_sequences(storage))
    with (
        progress(f"extract {artefact.label}", len(missing) * writer.layout.shard_rows, "tokens") as advance,
        stop_on_sigterm() as stop,
        ThreadPoolExecutor(1) as pool,
    ):
        while missing:
            if workspace.remote:  # claims reach only the processes of one machine: those of others start elsewhere
                turn = secrets.randbelow(len(missing))
                missing = missing[turn:] + missing[:turn]
            writing: Future[None] | None = None
            claimed = False
            for shard in missing:
                with ExitStack() as claim:
                    if claim.enter_context(workspace.claim(artefact, str(shard))) and not writer.committed(shard):
                        claimed = True
                        rows = make_rows(shard)
                        if writing:
                            writing.result()
                        # Written while the next shard goes through the model.
                        writing = pool.submit(_write, writer, shard, rows, claim.pop_all())
                        advance(writer.layout.shard_rows)
                if stop.is_set():
                    break
            if writing:
                writing.result()
            if stop.is_set():
                raise InterruptedRunError(f"stopped on request; {artefact.label} goes on with the same command")
            missing = still_missing()
            if missing and not claimed:
                time.sleep(SECONDS_BETWEEN_LOOKS)


def finish(artefact: Artefact, workspace: Workspace, seconds: float) -> None:
    """Publish a store whose shards are all committed, unless another process did; `seconds` is what it took."""
    with workspace.lock(artefact):
        if workspace.manifest(artefact) is None:
            _publish(artefact, workspace, seconds)


def _mend(artefact: Artefact, workspace: Workspace, deep: bool) -> bool:
    """Whether the store is whole. If it is not, only what is intact is left of it."""
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
    if found:
        workspace.reopen(artefact)
    for damage in found:
        print(f"repairing {storage}: {damage}", file=sys.stderr)
        if damage.shard is not None:
            storage.delete(commit_name(damage.shard))
        elif damage.file != MANIFEST:
            # Made again from the same inputs, the layout has the same bytes: shards that were committed stay valid.
            storage.delete(fmt.ROOT)
    return finished and not found


def _refuse_another(artefact: Artefact, storage: Storage) -> None:
    if fmt.is_laid_out(storage) and (key := key_of(fmt.read_layout(storage).provenance)) != artefact.key:
        raise BadInputError(f"{storage} holds the unfinished artefact {key}, not this one; move it away and run again")


def _write(writer: ShardWriter, shard: int, rows: ShardRows, claim: ExitStack) -> None:
    with claim:
        writer.write(shard, rows.layers, rows.fields)


def _publish(artefact: Artefact, workspace: Workspace, seconds: float) -> None:
    storage = workspace.storage(artefact)
    storage.sweep()
    store = ActivationStore(storage)
    fmt.read_sequences(storage)  # raises where they were damaged since: a manifest would take them for what was written
    shard_data = {name for commit in store.commits.values() for name in commit.files}
    workspace.publish(
        artefact,
        # The commits carry a checksum of every shard; the manifest carries one of every commit.
        files=[name for name in storage.sizes() if name not in shard_data],
        facts={
            "rows": store.rows,
            "bytes": store.bytes,
            "d_in": store.layout.d_in,
            "scales": {str(layer): store.scale(layer) for layer in store.layout.layers},
            "norms": {str(layer): store_norms(store.commits, layer) for layer in store.layout.layers},
            "seconds": round(seconds, 1),
        },
    )
