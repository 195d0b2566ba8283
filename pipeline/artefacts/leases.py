"""Locks between machines: objects of an object store that their holder renews, and that others take over when it is silent.

Who wants a lock that another holds looks at it again and again, and takes it when it has not been renewed for LASTS seconds
of its own clock, so that no two clocks need agree; after LONG_AGO one look is enough. Every change of a lock is a
conditional write, so that of two that take it one gets it. A holder that slept longer is told so by `assure`,
before it publishes anything.
"""

import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import Any, cast
from uuid import uuid4

from pipeline.artefacts.local_storage import LocalStorage
from pipeline.artefacts.locks import Locks
from pipeline.artefacts.manifest import RESERVED
from pipeline.artefacts.object_storage import PUT_AT_ONCE, ObjectStorage, Seen
from pipeline.errors import PipelineError, StorageError

LASTS = 120.0
"""Seconds without a renewal after which others may take a lock over. More than an object store's retries take."""
RENEWED = 20.0
"""Seconds between renewals."""
PAUSE = 2.0
"""Seconds between two looks at a lock that another machine holds."""
LONG_AGO = timedelta(hours=2)
"""A lock that was last renewed so long ago, by the object store's clock, is nobody's. The clock here cannot be so wrong: an
object store refuses requests that are signed by one that is a quarter of an hour off."""

DOMAIN = ".machine"


@dataclass(kw_only=True)
class _Lease:
    """A lock that this process holds."""

    name: str
    holder: str = field(default_factory=lambda: uuid4().hex)
    renewals: int = 0
    e_tag: str = ""
    """Of the object as this process wrote it last."""
    renewed: float = 0.0
    """When the last successful renewal began, by `time.monotonic`."""
    lost: bool = False
    guard: threading.Lock = field(default_factory=threading.Lock)

    @property
    def safe(self) -> bool:
        """Whether nobody can have taken it over yet."""
        return not self.lost and time.monotonic() - self.renewed < LASTS


class Leases:
    """The locks of a workspace on an object store. Those of `local` keep apart the processes that see the same folder."""

    def __init__(self, storage: ObjectStorage, local: Locks):
        self.storage, self.local = storage, local
        self._held: dict[str, _Lease] = {}
        self._seen: dict[str, tuple[str, float]] = {}
        """Of locks that others hold: the ETag, and when it was first seen."""
        self._change = threading.Condition()
        """Guards `_held`, and wakes the thread that renews."""
        self._renewer: threading.Thread | None = None

    @contextmanager
    def held(self, name: str) -> Generator[None]:
        """Hold a lock, after waiting for whoever holds it, here or on another machine."""
        with self.local.held(name):
            lease = self._taken(f"{name}/held")
            if lease is None:
                print(f"waiting for {self._holder(f'{name}/held')}, which works on {name}", file=sys.stderr)
            while lease is None:
                time.sleep(PAUSE)
                lease = self._taken(f"{name}/held")
            with self._renewed(lease):
                yield

    @contextmanager
    def attempted(self, name: str) -> Generator[bool]:
        """Hold a lock, or yield False when another process holds it."""
        with self.local.attempted(name) as free, self._tried(f"{name}/held", free) as mine:
            yield mine

    @contextmanager
    def claimed(self, name: str, part: str) -> Generator[bool]:
        """Hold one part of what a lock protects, or yield False when another process has it, or `alone` has all."""
        with self.local.claimed(name, part) as free, self._tried(_claim(name, part), free) as mine:
            # Looked at after the claim is written, while `alone` writes before it looks: one of the two sees the other.
            yield mine and not self._is_alive(f"{name}/alone")

    @contextmanager
    def alone(self, name: str) -> Generator[bool]:
        """Hold all parts of what a lock protects, or yield False when another process has one."""
        with self.local.alone(name) as free, self._tried(f"{name}/alone", free) as mine:
            # Each is looked at, also after one that is alive: how long a holder is silent counts from the first look.
            yield mine and not [claim for claim in self.storage.sizes(f"{name}/claims") if self._is_alive(claim)]

    def sweep(self, name: str) -> None:
        """Remove what is left of claims on the parts of what a lock protects. Living claims stay."""
        for claim in self.storage.sizes(f"{name}/claims"):
            with self.local.claimed(name, claim.rpartition("/")[2]) as free:  # free of processes that see the same folder
                if free and not self._is_alive(claim):
                    self.storage.delete(claim)

    def assure(self, name: str, part: str | None = None) -> None:
        """Raise StorageError if this process has lost a lock, or a claim on a part, to another machine. Renews it."""
        lease = self._held[f"{name}/held" if part is None else _claim(name, part)]
        self._renew(lease)
        if lease.lost:
            raise StorageError(
                f"{self.storage}/{lease.name}: this process did nothing for {LASTS:g} seconds, and another machine took "
                f"over its work; run the same command again"
            )

    @contextmanager
    def _tried(self, name: str, free: bool) -> Generator[bool]:
        """Hold a lock if the local one is `free` and no other machine has this one; yield whether that is so."""
        lease = self._taken(name) if free else None
        if lease is None:
            yield False
            return
        with self._renewed(lease):
            yield True

    def _taken(self, name: str) -> _Lease | None:
        """Take a lock; None while another machine has it."""
        lease, began = _Lease(name=name), time.monotonic()
        content = self._content(lease)
        e_tag = self.storage.swap(name, content, None)
        if e_tag is None and (there := self.storage.look(name)) and self._is_dead(name, there):
            e_tag = self.storage.swap(name, content, there.e_tag)
        if e_tag is None:
            return None
        self._seen.pop(name, None)
        lease.e_tag, lease.renewed = e_tag, began
        return lease

    def _is_alive(self, name: str) -> bool:
        there = self.storage.look(name)
        return there is not None and not self._is_dead(name, there)

    def _is_dead(self, name: str, there: Seen) -> bool:
        """Whether a lock's holder is gone. Call it while no process of this domain holds the lock here."""
        known, since = self._seen.setdefault(name, (there.e_tag, time.monotonic()))
        if known != there.e_tag:
            self._seen[name] = there.e_tag, time.monotonic()
            since = time.monotonic()
        silent = time.monotonic() - since >= LASTS or datetime.now(UTC) - there.modified > LONG_AGO
        return silent or _record(there.content).get("domain") == self.domain

    def _holder(self, name: str) -> str:
        there = self.storage.look(name)
        record = _record(there.content) if there else {}
        return f"process {record['pid']} on {record['host']}" if {"pid", "host"} <= record.keys() else "another process"

    @cached_property
    def domain(self) -> str:
        """Names the machines and processes between which the local locks hold: those that see one folder."""
        folder = LocalStorage(self.local.folder, within=self.local.within)
        try:
            known = folder.read(DOMAIN)
        except FileNotFoundError:
            folder.create(DOMAIN, uuid4().hex.encode())
            known = folder.read(DOMAIN)
        # A copy of the folder may be on another machine.
        return f"{known.decode(errors='replace')} {platform.node()}"

    def _content(self, lease: _Lease) -> bytes:
        facts = {"domain": self.domain, "host": platform.node(), "pid": os.getpid()}
        return json.dumps({"holder": lease.holder, "renewals": lease.renewals, **facts}).encode()

    @contextmanager
    def _renewed(self, lease: _Lease) -> Generator[None]:
        """Renew a lock in the background until the block ends, then give it back."""
        with self._change:
            self._held[lease.name] = lease
            if self._renewer is None:
                self._renewer = threading.Thread(target=self._keep_renewing, name="leases", daemon=True)
                self._renewer.start()
        try:
            yield
        finally:
            with self._change:
                del self._held[lease.name]
                self._change.notify()
            with lease.guard, suppress(PipelineError):  # it ends by itself where it cannot be given back
                if lease.safe:  # otherwise another machine may have it
                    self.storage.delete(lease.name)

    def _keep_renewing(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: not self._held, RENEWED)
                if not self._held:
                    self._renewer = None
                    return
                held = list(self._held.values())
            for lease in held:
                with suppress(PipelineError):  # renewed the next time, or lost
                    self._renew(lease)

    def _renew(self, lease: _Lease) -> None:
        with lease.guard:
            if lease.lost:
                return
            began = time.monotonic()
            lease.renewals += 1
            content = self._content(lease)
            e_tag = self.storage.swap(lease.name, content, lease.e_tag)
            there = self.storage.look(lease.name) if e_tag is None else None
            if there and _record(there.content).get("holder") == lease.holder:  # of the renewal before, the answer was lost
                e_tag = self.storage.swap(lease.name, content, there.e_tag)
            if e_tag is None:
                lease.lost = True
            else:
                lease.e_tag, lease.renewed = e_tag, began


def fenced(
    storage: ObjectStorage, record: str, files: Iterable[str], assure: Callable[[], None]
) -> Callable[[str, bytes], None]:
    """How to write files and then the record that vouches for them, so that no other machine's record can vouch for them.

    The record's name is reserved first: a machine that slept and writes its record from now on finds another ETag there, and
    so does one that writes a file after this machine has. `assure` says that the lock is still held. Where another machine
    wrote in between, StorageError is raised.
    """

    def put(name: str, content: bytes) -> None:
        if len(content) > PUT_AT_ONCE:
            storage.write(name, content)
            return
        seen[name] = storage.swap(name, content, seen[name])
        if seen[name] is None:
            raise StorageError(f"{storage}/{name} was written by another machine meanwhile; run the same command again")

    seen = {record: storage.e_tag(record)}
    assure()
    put(record, RESERVED + uuid4().hex.encode())
    seen |= {name: storage.e_tag(name) for name in files}
    return put


def _claim(name: str, part: str) -> str:
    return f"{name}/claims/{part}"


def _record(content: bytes) -> dict[str, Any]:
    """What the object of a lock says of its holder; nothing if it is not as `_content` wrote it."""
    try:
        record: Any = json.loads(content)
    except ValueError:
        return {}
    return cast("dict[str, Any]", record) if isinstance(record, dict) else {}
