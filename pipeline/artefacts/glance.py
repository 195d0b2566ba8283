"""A workspace on an object store as it is at one time: one listing, and all manifests in one object.

Asking for each artefact would take a study's thousands of requests. The catalogue of manifests is written by whoever found
many that were not in it; what it holds is believed only if the listing has the same ETag for the manifest itself.
"""

import gzip
import json
from bisect import bisect_left
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import takewhile
from typing import cast

from pipeline.artefacts.manifest import MANIFEST
from pipeline.artefacts.object_storage import Listed, ObjectStorage
from pipeline.artefacts.storage import Storage
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import PipelineError

CATALOGUE = ".catalogue.json.gz"
MANY = 20
"""Manifests that were not in the catalogue, from which on it is written anew."""


@dataclass
class _Found:
    """What lies below a prefix."""

    objects: dict[str, Listed]
    known: dict[str, tuple[str, str]]
    """The catalogue: ETag and content of manifests."""
    names: list[str] = field(init=False)
    new: int = 0

    def __post_init__(self) -> None:
        self.names = sorted(self.objects)

    def below(self, prefix: str) -> dict[str, int]:
        """Bytes of every object below a prefix, by its whole name."""
        inside = takewhile(lambda name: name.startswith(prefix), self.names[bisect_left(self.names, prefix) :])
        return {name: self.objects[name].bytes for name in inside}


class _Place(ObjectStorage):
    """A prefix inside what was found: it asks for nothing that the listing or the catalogue has."""

    def __init__(self, url: str, path: str, found: _Found):
        super().__init__(url)
        self.path, self.found = path, found

    def read(self, name: str, limit: int | None = None) -> bytes:
        """All of an object; of a manifest, as the catalogue has it if that is the one that was listed."""
        whole = f"{self.path}/{name}"
        if whole not in self.found.objects:
            raise FileNotFoundError(whole)
        if name != MANIFEST:
            return super().read(name, limit)
        e_tag, content = self.found.known.get(whole, ("", ""))
        if e_tag != self.found.objects[whole].e_tag:
            read = super().read(name, limit)
            with suppress(UnicodeDecodeError):
                self.found.known[whole] = self.found.objects[whole].e_tag, read.decode()
                self.found.new += 1
            return read
        return content.encode()

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every object below a prefix, by name."""
        inside = "/".join(part for part in (self.path, prefix) if part)
        return {name.removeprefix(f"{self.path}/"): size for name, size in self.found.below(f"{inside}/").items()}

    def size(self, name: str) -> int | None:
        """Bytes of one object, None when there is none."""
        there = self.found.objects.get(f"{self.path}/{name}")
        return there.bytes if there else None


class Glance(Workspace):
    """A workspace on an object store as it was when this was made. Read only."""

    def __init__(self, workspace: Workspace):
        self.remote, self.root, self.local = workspace.remote, workspace.root, workspace.local
        self.whole = ObjectStorage(str(workspace.root))
        self.found = _Found(self.whole.listed(), self._catalogue())

    def place(self, path: str) -> Storage:
        """The storage at a path inside the workspace."""
        return _Place(f"{self.root}/{path}", path, self.found)

    def _remember(self) -> None:
        """Write the catalogue if many manifests were not in it. Who may only read cannot, and need not."""
        if self.found.new >= MANY:
            known = {name: entry for name, entry in self.found.known.items() if name in self.found.objects}
            with suppress(PipelineError):
                self.whole.write(CATALOGUE, gzip.compress(json.dumps(known).encode()))

    @classmethod
    @contextmanager
    def at(cls, workspace: Workspace) -> Generator[Workspace]:
        """A workspace as it is now; one in a folder as it is whenever it is asked, which costs nothing there."""
        if not workspace.remote:
            yield workspace
            return
        seen = cls(workspace)
        yield seen
        seen._remember()

    def _catalogue(self) -> dict[str, tuple[str, str]]:
        try:
            entries = cast("dict[str, list[str]]", json.loads(gzip.decompress(self.whole.read(CATALOGUE))))
            return {name: (e_tag, content) for name, (e_tag, content) in entries.items()}
        except (FileNotFoundError, OSError, EOFError, ValueError, TypeError, AttributeError):
            return {}  # none, or none that can be read: it is written anew
