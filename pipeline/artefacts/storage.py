"""Reads and writes files in a local folder or a prefix of an object store, by one small set of operations.

Names are relative, with forward slashes. A write is atomic, and durable when it returns. What the system or the object store
refuses is one line, as StorageError or PipelineError; only what is not there is absent.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from pipeline.artefacts.local_files import fsync
from pipeline.artefacts.local_storage import LocalStorage
from pipeline.artefacts.object_storage import SCHEME, ObjectStorage
from pipeline.artefacts.system_errors import explained

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = [
    "RECORD_BYTES",
    "SCHEME",
    "LocalStorage",
    "ObjectStorage",
    "Storage",
    "cache_folder",
    "explained",
    "fsync",
    "open_storage",
    "read_many",
    "write_atomically",
]

RECORD_BYTES = 2**28
"""More than any record of an artefact has: what is larger is not read into memory."""


class Storage(Protocol):
    """The operations that LocalStorage and ObjectStorage share."""

    parallel_reads: int
    """Number of parallel reads that gives the best throughput."""

    def read(self, name: str, limit: int | None = None) -> bytes:
        """All of a file. Raises FileNotFoundError, and CorruptArtefactError beyond `limit` bytes."""
        ...

    def read_into(self, name: str, offset: int, buffers: "list[npt.NDArray[np.uint8]]") -> None:
        """Fill the buffers from `offset` on. Raises FileNotFoundError, and EOFError for a file that is too short."""
        ...

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a file, replacing what was there."""
        ...

    def create(self, name: str, content: bytes | memoryview) -> bool:
        """Write a file unless it exists; returns False when it does, and leaves it as it is."""
        ...

    def share(self, name: str, source: "Storage", source_name: str) -> bool:
        """Give a file of another folder a name here, replacing what was there. False where its bytes must be copied."""
        ...

    def delete(self, name: str) -> None:
        """Remove a file if it exists."""
        ...

    def folders(self, prefix: str = "") -> list[str]:
        """Names of the folders in a folder."""
        ...

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every complete file below a folder, by name."""
        ...

    def size(self, name: str) -> int | None:
        """Bytes of one file, None when there is none."""
        ...

    def link(self, name: str) -> str:
        """A URL of a file for a browser."""
        ...

    def sweep(self) -> None:
        """Remove temporary files of dead writers. Those of living ones stay."""
        ...

    def zarr_store(self) -> Any:
        """This storage as a read-only store of zarr-python."""
        ...


def open_storage(place: "str | Path | Storage") -> Storage:
    """The storage at a path or an `s3://bucket/prefix` URL."""
    if isinstance(place, str):
        return ObjectStorage(place) if place.startswith(SCHEME) else LocalStorage(Path(place))
    return LocalStorage(place) if isinstance(place, Path) else place


def cache_folder() -> Path:
    """The user's cache folder, for what can be made or fetched again."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dasae"


def read_many(storage: Storage, names: Iterable[str]) -> list[bytes]:
    """The content of several records, read in parallel."""
    with ThreadPoolExecutor(storage.parallel_reads) as pool:
        return list(pool.map(partial(storage.read, limit=RECORD_BYTES), names))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file atomically: a temporary file beside it, synced, then renamed over it."""
    LocalStorage(path.parent).write(path.name, content)
