"""Arrays with an entry for each sequence or document: written chunk by chunk as they grow, read whole or in parts."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import google_crc32c
import numcodecs
import numpy as np
import numpy.typing as npt
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import MemoryStore

from pipeline.artefacts.identity import sha256
from pipeline.artefacts.storage import Storage, read_many
from pipeline.errors import CorruptArtefactError

ENTRIES = 8192
"""Entries of a chunk, at most; an array with fewer has one chunk."""
CRC_BYTES = 4
ZSTD = cast("Any", numcodecs.Zstd(level=1))  # numcodecs has no types
LARGEST_CHUNK = 2**32
"""Bytes of a chunk in memory."""
REMEDY = "repair it with the command that made it, `dasae extract EXPERIMENT --deep`"
UNREADABLE = (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError, FileNotFoundError)
"""What zarr and the parsers raise for damaged metadata, checksums and compressed bytes."""


@dataclass
class GrowingArray:
    """An array that is written while it grows. A full chunk becomes a file at once, so memory holds less than one."""

    storage: Storage
    name: str
    length: int = 0
    """Entries in files."""
    files: dict[str, str] = field(default_factory=dict[str, str])
    """SHA-256 of every file so far, by name."""
    _parts: list[npt.NDArray[Any]] = field(default_factory=list[npt.NDArray[Any]])
    """Entries that do not fill a chunk yet."""
    _waiting: int = 0
    """How many these are."""

    def append(self, values: npt.NDArray[Any]) -> bool:
        """Append entries; True if that wrote a file."""
        self._parts.append(values)
        self._waiting += len(values)
        if self._waiting < ENTRIES:
            return False
        rest = self.rest
        while len(rest) >= ENTRIES:
            self._write(rest[:ENTRIES], ENTRIES)
            rest = rest[ENTRIES:]
        self._parts, self._waiting = [rest.copy()], len(rest)  # a view would keep all of it in memory
        return True

    @property
    def rest(self) -> npt.NDArray[Any]:
        """The entries that are in no file yet."""
        return np.concatenate(self._parts)

    def finish(self) -> dict[str, str]:
        """Write the last chunk and the metadata; returns `files`."""
        rest = self.rest
        shape, chunk = (self.length + len(rest), *rest.shape[1:]), min(self.length + len(rest), ENTRIES)
        if len(rest):
            self._write(rest, chunk)
        self._put(_metadata(self.name), _description(self.name, shape, chunk, rest.dtype))
        return self.files

    def _write(self, values: npt.NDArray[Any], chunk: int) -> None:
        self._put(chunk_file(self.name, self.length // ENTRIES, values.ndim), _encoded(values, chunk))
        self.length += len(values)

    def _put(self, name: str, content: bytes) -> None:
        self.storage.write(name, content)
        self.files[name] = sha256(content)


def _metadata(name: str) -> str:
    return f"{name}/zarr.json"


def _description(name: str, shape: tuple[int, ...], chunk: int, dtype: Any) -> bytes:
    """The metadata of an array, as zarr-python writes it."""
    files: dict[str, Buffer] = {}
    codecs = [ZstdCodec(level=1), Crc32cCodec()]
    zarr.create_array(
        MemoryStore(files), name=name, shape=shape, dtype=dtype, chunks=(chunk, *shape[1:]), compressors=codecs
    )
    return files[_metadata(name)].to_bytes()


def _encoded(values: npt.NDArray[Any], chunk: int) -> bytes:
    """The file of a chunk, byte for byte as zarr-python writes it, whose objects would keep chunks in memory for a while."""
    padded = np.zeros((chunk, *values.shape[1:]), values.dtype.newbyteorder("<"))
    padded[: len(values)] = values
    content = cast("bytes", ZSTD.encode(padded))
    return content + _checksum(content)


def _decoded(content: bytes, shape: tuple[int, ...], dtype: Any) -> npt.NDArray[Any]:
    """The entries of a chunk. Raises what is in UNREADABLE for a damaged one."""
    if _checksum(content[:-CRC_BYTES]) != content[-CRC_BYTES:]:
        raise ValueError("a chunk does not match its checksum")
    values = np.empty(shape, dtype)
    ZSTD.decode(content[:-CRC_BYTES], values)
    return values


def _checksum(content: bytes) -> bytes:
    return cast("int", google_crc32c.value(content)).to_bytes(CRC_BYTES, "little")  # google_crc32c has no types


def chunk_file(name: str, chunk: int, dimensions: int) -> str:
    """Name of the file of a chunk."""
    return f"{name}/c/{chunk}" + "/0" * (dimensions - 1)


class StoredArray:
    """An array of a store that is read in parts. Raises CorruptArtefactError for what cannot be read.

    `compare` is called with the name and content of every file that is read, and raises what it likes.
    """

    def __init__(self, storage: Storage, name: str, compare: Callable[[str, bytes], None] = lambda _, __: None):
        self.storage, self.name, self._compare = storage, name, compare
        try:
            content = storage.read(_metadata(name))
            compare(_metadata(name), content)
            metadata = default_buffer_prototype().buffer.from_bytes(content)
            array = zarr.open_array(MemoryStore({_metadata(name): metadata}), path=name, mode="r")
        except UNREADABLE as error:
            raise self._damaged(error) from None
        self.shape, self.chunk, self.dtype = array.shape, array.chunks[0], array.dtype
        if not 0 < math.prod(array.chunks) * array.dtype.itemsize <= LARGEST_CHUNK:
            raise self._damaged(f"a chunk has shape {array.chunks}")
        self._latest: tuple[int, npt.NDArray[Any]] | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Entries `start` to `stop` - 1."""
        if not start < stop:
            return self._chunk(0)[:0]
        chunks = range(start // self.chunk, -(-stop // self.chunk))
        parts = [self._chunk(chunk) for chunk in chunks]
        first = start - chunks[0] * self.chunk
        return np.concatenate(parts)[first : first + stop - start]

    def searchsorted(self, value: int, side: Any = "left") -> int:
        """What numpy's function says of a sorted array, at a few chunks read."""
        low, high = 0, -(-len(self) // self.chunk) - 1
        while low < high:  # the last chunk that begins before the place
            middle = (low + high + 1) // 2
            if middle not in self._firsts:
                self._firsts[middle] = int(self._chunk(middle)[0])
            first = self._firsts[middle]
            if first < value or (side == "right" and first == value):
                low = middle
            else:
                high = middle - 1
        return low * self.chunk + int(np.searchsorted(self._chunk(low), value, side))

    @cached_property
    def _firsts(self) -> dict[int, int]:
        """The first entry of chunks that were looked at."""
        return {}

    def _chunk(self, chunk: int) -> npt.NDArray[Any]:
        if self._latest is None or self._latest[0] != chunk:
            shape, file = (self.chunk, *self.shape[1:]), chunk_file(self.name, chunk, len(self.shape))
            try:
                content = self.storage.read(file)
                self._compare(file, content)
                values = _decoded(content, shape, self.dtype)
            except (*UNREADABLE, MemoryError) as error:
                raise self._damaged(error) from None
            self._latest = chunk, values[: len(self) - chunk * self.chunk]
        return self._latest[1]

    def _damaged(self, why: object) -> CorruptArtefactError:
        return CorruptArtefactError(f"{self.storage}/{self.name} cannot be read: {why}; {REMEDY}")


def read_whole(storage: Storage, name: str, compare: Callable[[str, bytes], None] = lambda _, __: None) -> npt.NDArray[Any]:
    """All of an array. Raises CorruptArtefactError, and what `compare` raises for a file's content."""
    names = list(storage.sizes(name))
    as_buffer = default_buffer_prototype().buffer.from_bytes
    contents = dict(zip(names, read_many(storage, names), strict=True))
    for file, content in contents.items():
        compare(file, content)
    try:
        files = {file: as_buffer(content) for file, content in contents.items()}
        whole = zarr.open_array(MemoryStore(files), path=name, mode="r")
        # Before zarr counts chunks that no file holds, or asks for their memory. It would fill a missing one with zeros.
        if whole.nchunks > len(files) or whole.nchunks_initialized < whole.nchunks:
            raise ValueError("a chunk is missing")
        if math.prod(whole.chunks) * whole.dtype.itemsize > LARGEST_CHUNK:
            raise ValueError(f"a chunk has shape {whole.chunks}")
        return np.asarray(whole[:])
    except (*UNREADABLE, MemoryError) as error:
        raise CorruptArtefactError(f"{storage}/{name} cannot be read: {error}; {REMEDY}") from None
