"""Keeps artefacts in a workspace: one folder each, named by a label and a hash of everything that determines its bytes.

An artefact exists when its `manifest.json` does, which is written last and atomically. A folder without one is unfinished
work that its stage may resume or overwrite. The workspace is a folder or a prefix of an object store. On an object store,
stores are written and read in place; everything else is made in a local folder and copied when it is finished.
"""

import json
import os
import platform
import re
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.artefacts.identity import key_of, sealed, sha256, sha256_file
from pipeline.artefacts.leases import Leases, fenced
from pipeline.artefacts.local_files import fsync, is_abandoned, refuse_outside, remove_tree
from pipeline.artefacts.local_storage import LocalStorage
from pipeline.artefacts.locks import Locks
from pipeline.artefacts.manifest import (
    MANIFEST,
    Artefact,
    FileRecord,
    Kind,
    Manifest,
    is_reserved,
    library_versions,
    manifest_bytes,
    read_manifest,
)
from pipeline.artefacts.object_storage import SCHEME, ObjectStorage
from pipeline.artefacts.storage import Storage, cache_folder, write_atomically
from pipeline.artefacts.system_errors import explained
from pipeline.artefacts.unfinished import Unfinished
from pipeline.errors import BadInputError, CorruptArtefactError, MissingArtefactError, PipelineError, StorageError

LOCKS, REPORTS = ".locks", "reports"
"""Folders of a workspace beside those of the artefacts' kinds."""
RING = "ring"
"""Folder, inside that of a store, of what is made of it while it is read."""


class Workspace:
    """A folder or `s3://` prefix of artefacts. Several processes may call every method at the same time."""

    def __init__(self, root: Path | str, *, only_read: bool = False):
        self.remote = str(root).startswith(SCHEME)
        # A mistyped URL is no folder, and neither is what a shell made of an empty variable.
        if not self.remote and re.match(r"[a-z0-9]*:|\s*$|.*\0", str(root)):
            raise BadInputError(f"workspace {str(root)!r} is neither a folder nor an s3://bucket/prefix; name another one")
        self.root = root
        self.local = _scratch(str(root)) if self.remote else _expanded(root)
        """Where artefacts are; with an object store, where they are made before they are copied there."""
        self._here = Locks(self.local / LOCKS, within=self.local)
        self._locks: Locks | Leases = self._here
        """With an object store, those of all machines."""
        with explained(self.local, "read"):
            if any(os.path.lexists(path) and not path.is_dir() for path in (self.local, *self.local.parents)):
                raise BadInputError(f"workspace {root} is not a folder; name another one with --workspace")
        if self.remote:
            # A wrong bucket fails now, not after hours of work.
            ObjectStorage(str(root)).check(only_read=only_read)
            self._locks = Leases(ObjectStorage(f"{root}/{LOCKS}"), self._here)
        self._unfinished: dict[str, Unfinished] = {}

    def __reduce__(self) -> tuple[type["Workspace"], tuple[Path | str]]:
        """Another process, to which Dask sends a task, opens it anew."""
        return Workspace, (self.root,)

    def folder(self, artefact: Artefact) -> Path:
        """The artefact's folder on this machine; it need not exist yet."""
        return self.local / artefact.kind / artefact.name

    def storage(self, artefact: Artefact) -> Storage:
        """The storage that holds the artefact."""
        return self.place(artefact.path)

    def place(self, path: str) -> Storage:
        """The storage at a path inside the workspace, such as `saes/full-s0-0123456789ab`."""
        return ObjectStorage(f"{self.root}/{path}") if self.remote else LocalStorage(self.local / path, within=self.local)

    def ring(self, artefact: Artefact) -> LocalStorage:
        """The storage of what is made of a store while it is read, always on this machine (`pipeline.store.ring`).

        Nothing there outlives the processes that read it, so that it need not be durable.
        """
        return LocalStorage(self.folder(artefact) / RING, within=self.local, durable=False)

    def discard_ring(self, artefact: Artefact) -> None:
        """Remove what is there. The caller knows that nobody reads it."""
        remove_tree(self.folder(artefact) / RING, self.local)

    def report(self, experiment: str) -> Storage:
        """The storage that holds the report of an experiment."""
        return self.place(f"{REPORTS}/{experiment}")

    def manifest(self, artefact: Artefact) -> Manifest | None:
        """The manifest of a finished artefact; None when it does not exist or is stale, because a parent has changed.

        Raises CorruptArtefactError when a file is missing or has another size than in the manifest, and BadInputError when
        the manifest is another artefact's.
        """
        storage = self.storage(artefact)
        manifest = read_manifest(storage, _remedy(artefact, storage))
        if manifest is None:
            return None
        if (manifest.kind, manifest.key) != (artefact.kind, artefact.key):
            raise BadInputError(
                f"{storage} holds the artefact {manifest.key}, which does not belong to this experiment; "
                f"move it away and run again"
            )
        sizes = storage.sizes()  # one listing instead of a request for each file
        for name, record in manifest.files.items():
            if sizes.get(name) != record.bytes:
                found = "is missing" if sizes.get(name) is None else f"has {sizes[name]} bytes instead of {record.bytes}"
                raise CorruptArtefactError(f"{storage}/{name} {found}; {_remedy(artefact, storage)}")
        if any((self.fingerprint(path) or "") != known for path, known in manifest.parents.items()):
            return None
        return manifest

    def require(self, artefact: Artefact, command: str) -> Manifest:
        """The manifest of an artefact that a stage reads. Raises MissingArtefactError with the `command` to make it."""
        manifest = self.manifest(artefact)
        if manifest is None:
            stale = self.fingerprint(artefact.path) is not None
            what = (
                "is out of date, because what it was made from has changed; make it again"
                if stale
                else "does not exist yet; make it"
            )
            raise MissingArtefactError(f"{self.storage(artefact)} {what} with: {command}")
        return manifest

    def fingerprint(self, path: str) -> str | None:
        """SHA-256 of the manifest of the artefact at `path`, None without one. It changes when the artefact is rebuilt."""
        content = manifest_bytes(self.place(path))
        return None if content is None else sha256(content)

    def fingerprints(self, artefacts: Iterable[Artefact]) -> dict[str, str]:
        """The fingerprint of each artefact by path, "" for one that does not exist: the `parents` of what is made from them.

        Call this before reading the parents; if one is rebuilt meanwhile, the child becomes stale.
        """
        return {artefact.path: self.fingerprint(artefact.path) or "" for artefact in artefacts}

    def verified(self, artefact: Artefact, name: str, manifest: Manifest | None = None) -> Path:
        """Path on this machine of one file of a finished artefact, after comparing its hash with the manifest's.

        Pass `manifest` if it was just read, to save reading it again. Raises MissingArtefactError for a file that the
        artefact does not have, and CorruptArtefactError for one that has changed.
        """
        manifest = manifest or self.manifest(artefact)
        path = self.folder(artefact) / name
        if manifest is None or name not in manifest.files:
            raise MissingArtefactError(f"{self.storage(artefact)}/{name} is not there; run again the stage that makes it")
        known = manifest.files[name].sha256
        with explained(path, "read"):
            if self.remote and not (path.is_file() and sha256_file(path) == known):
                write_atomically(path, self.storage(artefact).read(name))
            if not path.is_file() or sha256_file(path) != known:
                remedy = _remedy(artefact, self.storage(artefact))
                raise CorruptArtefactError(f"{path} was changed after it was made; {remedy}")
        return path

    def fetched(self, artefact: Artefact) -> Path:
        """Folder on this machine with all files of a finished artefact, verified, and its manifest."""
        manifest = self.manifest(artefact)
        for name in manifest.files if manifest else ():
            self.verified(artefact, name, manifest)
        if self.remote:
            write_atomically(self.folder(artefact) / MANIFEST, self.storage(artefact).read(MANIFEST))
        return self.folder(artefact)

    def finished(self, kind: Kind) -> list[str]:
        """Folder names of all finished artefacts of one kind, of all studies."""
        names = (name.rpartition("/") for name in self.place(kind).sizes())
        return sorted(folder for folder, _, name in names if name == MANIFEST)

    @contextmanager
    def lock(self, artefact: Artefact) -> Generator[Path]:
        """Hold the artefact's lock, after waiting for a process that holds it; yields the artefact's folder, which exists.

        The kernel releases the lock when its holder dies; on an object store other machines take it over after a while.
        """
        with self._locks.held(_lock_name(artefact)):
            folder = self.folder(artefact)
            refuse_outside(folder / "x", self.local)
            with explained(folder, "written"):
                folder.mkdir(parents=True, exist_ok=True)
            if self.remote and is_reserved(self.storage(artefact)):
                self.reopen(artefact)  # it was killed, or it sleeps and is to find the reservation gone
            yield folder

    @contextmanager
    def claim(self, artefact: Artefact, part: str, *, here: bool = False) -> Generator[bool]:
        """Claim one part of an artefact that several processes make together; yields False when another process has it.

        `here` is for a part that lies on this machine only, wherever the workspace is.
        """
        with (self._here if here else self._locks).claimed(_lock_name(artefact), part) as claimed:
            yield claimed

    def keep(self, artefact: Artefact) -> None:
        """Copy unfinished work to the object store, where another machine can go on with it. Call it with the lock held.

        Raises StorageError if another machine has taken over the work. In a folder nothing need be done.
        """
        if unfinished := self._unfinished_of(artefact):
            self._locks.assure(_lock_name(artefact))
            unfinished.keep()

    def restore(self, artefact: Artefact) -> None:
        """Bring unfinished work to this machine if another one did it. Call it with the lock held."""
        if unfinished := self._unfinished_of(artefact):
            unfinished.restore()

    def _unfinished_of(self, artefact: Artefact) -> Unfinished | None:
        storage = self.storage(artefact)
        if not isinstance(storage, ObjectStorage) or not isinstance(self._locks, Leases):
            return None
        new = Unfinished(self.folder(artefact), self.local, storage, self._locks.domain)
        return self._unfinished.setdefault(artefact.path, new)

    def assure_claim(self, artefact: Artefact, part: str) -> None:
        """Raise StorageError if another machine has taken over a part that this process claimed and was silent about."""
        self._locks.assure(_lock_name(artefact), part)

    @contextmanager
    def turn(self, artefact: Artefact, part: str) -> Generator[None]:
        """Hold one part of an artefact that lies on this machine only, after waiting for a process that holds it."""
        with self._here.held(f"{_lock_name(artefact)}.part-{part}"):
            yield

    def publish(
        self,
        artefact: Artefact,
        *,
        files: Iterable[str] | None = None,
        parents: Mapping[str, str] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Write the manifest, after which the artefact exists. Call it with the lock held and every file complete.

        `files` are the paths to record, relative to the folder; by default all files of the folder on this machine, without
        what killed writers left there, which is removed. On an object store, files of that folder are copied there first.
        `parents` is what `fingerprints` returned before the parents were read. Raises StorageError when one of the files is
        gone, and when another machine has taken over the work.
        """
        folder, storage = self.folder(artefact), self.storage(artefact)
        here = LocalStorage(folder, within=self.local)
        here.sweep()
        names = sorted(set(here.sizes() if files is None else files) - {MANIFEST})
        made = [name for name in names if self.remote and (folder / name).is_file()]
        put = storage.write
        if isinstance(storage, ObjectStorage):
            put = fenced(storage, MANIFEST, made, partial(self._locks.assure, _lock_name(artefact)))
        for name in made:
            put(name, (folder / name).read_bytes())
        records = {name: _record(folder / name, storage, name) for name in names}
        manifest = Manifest(
            kind=artefact.kind,
            key=artefact.key,
            inputs=json.loads(json.dumps(artefact.inputs)),
            files=records,
            parents=dict(parents or {}),
            facts=dict(facts or {}),
            versions=library_versions(),
            host=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            finished=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )
        put(MANIFEST, json.dumps(sealed(json.loads(manifest.model_dump_json())), indent=1).encode())
        if isinstance(self._locks, Leases):
            self._locks.sweep(_lock_name(artefact))
        if self._unfinished.pop(artefact.path, None):
            for name in storage.sizes().keys() - {MANIFEST, *names}:
                storage.delete(name)  # what `keep` copied
        return manifest

    def discard(self, artefact: Artefact) -> None:
        """Remove an artefact, finished or not, so that its stage makes it again. Waits for a process that holds its lock.

        Raises PipelineError while other processes hold parts of it.
        """
        storage, folder = self.storage(artefact), self.folder(artefact)
        refuse_outside(folder / "x", self.local)
        with self.lock(artefact), self._locks.alone(_lock_name(artefact)) as alone:
            if not alone:
                raise PipelineError(f"{storage} is being filled by another process: stop that one, then run this again")
            storage.delete(MANIFEST)  # first: it must not look finished while files are missing
            for name in storage.sizes():
                storage.delete(name)
            remove_tree(folder, self.local)

    def is_locked(self, path: str) -> bool:
        """Whether a process works on the artefact at a path inside the workspace."""
        name = path.replace("/", "-")
        with self._locks.attempted(name) as mine, self._locks.alone(name) as alone:
            return not (mine and alone)

    def is_free(self, lock: str) -> bool:
        """Whether a lock, by its file's name, is one that nobody holds."""
        return is_abandoned(self.local / LOCKS / lock)

    def remove(self, path: str) -> bool:
        """Remove a file or folder inside the workspace; False if a process works on the artefact it belongs to."""
        artefact = "/".join(path.split("/")[:2])
        name = artefact.replace("/", "-")
        with self._locks.attempted(name) as mine, self._locks.alone(name) as alone:
            if not (mine and alone):
                return False
            storage = self.place("")
            for file in self.place(path).sizes() if self.remote else ():
                storage.delete(f"{path}/{file}")
            target = self.local / path
            if target.is_dir() and not target.is_symlink():
                remove_tree(target, self.local)
            else:
                storage.delete(path)
        return True

    def reopen(self, artefact: Artefact) -> None:
        """Mark a finished artefact as unfinished, so that its stage can repair or replace it."""
        self.storage(artefact).delete(MANIFEST)


def _lock_name(artefact: Artefact) -> str:
    return f"{artefact.kind}-{artefact.name}"


def _expanded(root: Path | str) -> Path:
    try:
        return Path(root).expanduser()
    except RuntimeError:
        raise BadInputError(f"workspace {root}: there is no such user; name the folder by its whole path") from None


def _record(path: Path, storage: Storage, name: str) -> FileRecord:
    try:
        if path.is_file():
            with explained(path, "read"):
                fsync(path)
                return FileRecord(bytes=path.stat().st_size, sha256=sha256_file(path))
        content = storage.read(name)
    except FileNotFoundError:
        raise StorageError(f"{storage}/{name} was removed before it was published; run the same command again") from None
    return FileRecord(bytes=len(content), sha256=sha256(content))


def _scratch(url: str) -> Path:
    """The local folder in which the artefacts of a remote workspace are made."""
    return cache_folder() / f"{re.sub(r'[^a-z0-9]+', '-', url.removeprefix(SCHEME).lower())}-{key_of({'url': url})}"


def _remedy(artefact: Artefact, storage: Storage) -> str:
    if artefact.kind in ("stores", "probes"):  # too large to be made again because of one file
        return "repair it with `dasae extract EXPERIMENT --deep`"
    return f"delete {storage} and run the same command again"
