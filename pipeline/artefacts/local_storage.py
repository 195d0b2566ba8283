"""Reads and writes files in a folder of a local or shared file system."""

import os
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artefacts.local_files import (
    fsync,
    is_temporary,
    link,
    opened,
    refuse_dangling,
    refuse_outside,
    share,
    sweep,
    temporary,
)
from pipeline.artefacts.system_errors import explained
from pipeline.errors import BadInputError, CorruptArtefactError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class LocalStorage:
    """A folder of a local or shared file system.

    `within` is the folder that nothing written or deleted may leave through a link, by default `root`. What is not `durable`
    is not synced: after a power failure it may be lost or incomplete.
    """

    parallel_reads = 2

    def __init__(self, root: Path, within: Path | None = None, *, durable: bool = True):
        self.root = root
        self.within = within or root
        self.durable = durable

    def __str__(self) -> str:
        return str(self.root)

    def read(self, name: str, limit: int | None = None) -> bytes:
        """All of a file. Raises FileNotFoundError, and CorruptArtefactError beyond `limit` bytes."""
        path = self.root / name
        with explained(path, "read"), opened(path) as (descriptor, size):
            if limit is not None and size > limit:
                raise CorruptArtefactError(f"{path} has {size} bytes, more than the {limit} that it can have")
            with os.fdopen(descriptor, "rb", closefd=False) as file:
                return file.read(size)

    def read_into(self, name: str, offset: int, buffers: "list[npt.NDArray[np.uint8]]") -> None:
        """Fill the buffers by one `preadv`, which copies straight from the page cache and needs no file position."""
        path = self.root / name
        with explained(path, "read"), opened(path) as (descriptor, _):
            wanted = sum(buffer.nbytes for buffer in buffers)
            read = os.preadv(descriptor, [buffer.data for buffer in buffers], offset)
        if read != wanted:
            raise EOFError(f"{path} ends before byte {offset + wanted}")

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a temporary file beside the final one, sync it, and rename it over the final one."""
        final = self.root / name
        refuse_outside(final, self.within)
        with explained(final), temporary(final, content, durable=self.durable) as written:
            written.replace(final)
            self._sync(final.parent)

    def create(self, name: str, content: bytes | memoryview) -> bool:
        """Like `write`, but never replaces a file: of two writers the first wins."""
        final = self.root / name
        refuse_outside(final, self.within)
        with explained(final), temporary(final, content, durable=self.durable) as written:
            created = link(written, final)
            self._sync(final.parent)
        return created

    def _sync(self, folder: Path) -> None:
        if self.durable:
            fsync(folder)

    def share(self, name: str, source: object, source_name: str) -> bool:
        """Give a file of another folder a second name here. False where the file system has no hard links to it."""
        if not isinstance(source, LocalStorage):
            return False
        final = self.root / name
        refuse_outside(final, self.within)
        with explained(final):
            shared = share(source.root / source_name, final)
            fsync(final.parent)
        return shared

    def delete(self, name: str) -> None:
        """Remove a file if it exists; of a link, the link."""
        path = self.root / name
        refuse_outside(path, self.within)
        with explained(path, "deleted"):
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError):
                return

    def sweep(self) -> None:
        """Remove the temporary files of dead writers."""
        refuse_outside(self.root / "x", self.within)
        sweep(self.root)

    def sizes(self, prefix: str = "") -> dict[str, int]:
        """Bytes of every file below a folder, by name, without temporary files. Follows links."""
        with explained(self.root / prefix, "read"):
            return dict(self._listed(prefix.strip("/"), set()))

    def _listed(self, prefix: str, linked: set[str]) -> Generator[tuple[str, int]]:
        """Names and bytes below a folder; `linked` are the real paths of the links that were followed so far."""
        folder = self.root / prefix
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):  # also removed by another process since it was listed
            refuse_dangling(folder)
            return
        for entry in entries:
            name = f"{prefix}/{entry.name}" if prefix else entry.name
            if entry.is_dir():
                if entry.is_symlink():
                    _refuse_circle(Path(entry.path), linked)
                yield from self._listed(name, linked)
            elif not is_temporary(name) and (size := self.size(name)) is not None:
                yield name, size

    def folders(self, prefix: str = "") -> list[str]:
        """Names of the folders in a folder, sorted; none if it does not exist."""
        folder = self.root / prefix
        with explained(folder, "read"):
            try:
                return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
            except (FileNotFoundError, NotADirectoryError):
                refuse_dangling(folder)
                return []

    def size(self, name: str) -> int | None:
        """Bytes of one file, None when there is none."""
        path = self.root / name
        with explained(path, "read"):
            try:
                return path.stat().st_size
            except (FileNotFoundError, NotADirectoryError):
                refuse_dangling(path)
                return None

    def link(self, name: str) -> str:
        """A file:// URL, for a browser on a machine that sees the file."""
        return (self.root / name).resolve().as_uri()

    def zarr_store(self) -> Any:
        """The folder as a read-only store of zarr-python."""
        from zarr.storage import LocalStore

        return LocalStore(self.root, read_only=True)


def _refuse_circle(path: Path, linked: set[str]) -> None:
    """Raise BadInputError for a link to a folder above it, or to one that another link leads to: a listing would not end."""
    real, here = os.path.realpath(path), os.path.realpath(path.parent)
    if real in linked or os.path.commonpath([real, here]) == real:
        raise BadInputError(f"{path} is a link to {real}, which is above it or linked twice; remove the link")
    linked.add(real)
