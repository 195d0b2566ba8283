"""Reads chunks of a sharded Zarr array straight into the caller's buffer, without zarr-python.

zarr-python reads the same files (a test compares both), but takes several times as long: it reads a shard's index on every
call, and copies a chunk once per codec. Here each index is read once, and the kernel copies a raw chunk once.
"""

import json
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import numpy.typing as npt
from numcodecs.abc import Codec

from pipeline.artefacts.storage import Storage
from pipeline.errors import CorruptArtefactError

CRC_BYTES = 4
ABSENT = 2**64 - 1
"""Offset in a shard's index of a chunk that was never written."""
DECODERS: dict[str, Codec] = {"blosc": numcodecs.Blosc(), "zstd": numcodecs.Zstd()}


class ShardedArray:
    """One array of a store: rows in chunks, chunks in shard files."""

    def __init__(self, storage: Storage, name: str, metadata: dict[str, Any], chunk_rows: int, decoder: str | None):
        self.storage, self.name, self.chunk_rows = storage, name, chunk_rows
        self.shard_rows: int = metadata["chunk_grid"]["configuration"]["chunk_shape"][0]
        self.dtype = np.dtype(metadata["data_type"])
        self.row_shape = tuple(metadata["shape"][1:])
        self.decoder = DECODERS[decoder] if decoder else None
        self._indices: dict[int, npt.NDArray[np.uint64]] = {}

    @classmethod
    def open(cls, storage: Storage, name: str) -> "ShardedArray | None":
        """The array, or None for codecs other than those of docs/store-format.md, which zarr-python must read.

        Raises CorruptArtefactError for metadata that cannot be read.
        """
        try:
            return cls._parsed(storage, name, json.loads(storage.read(f"{name}/zarr.json")))
        except (FileNotFoundError, ValueError, TypeError, LookupError) as error:
            raise CorruptArtefactError(f"{storage}/{name}/zarr.json cannot be read: {error!r}") from None

    @classmethod
    def _parsed(cls, storage: Storage, name: str, metadata: dict[str, Any]) -> "ShardedArray | None":
        sharding, *others = metadata["codecs"]
        if others or sharding["name"] != "sharding_indexed":
            return None
        options = sharding["configuration"]
        inner = [codec["name"] for codec in options["codecs"]]
        index = [codec["name"] for codec in options["index_codecs"]]
        if (
            options["codecs"][0] != {"name": "bytes", "configuration": {"endian": "little"}}
            or inner[-1] != "crc32c"
            or index != ["bytes", "crc32c"]
            or options["index_location"] != "end"
        ):
            return None
        decoder = inner[1:-1]
        if len(decoder) > 1 or any(codec not in DECODERS for codec in decoder):
            return None
        return cls(storage, name, metadata, options["chunk_shape"][0], decoder[0] if decoder else None)

    def file(self, shard: int) -> str:
        """Name of a shard's file."""
        return f"{self.name}/c/{shard}" + "/0" * len(self.row_shape)

    def read(self, start: int, out: npt.NDArray[Any], file_bytes: int) -> None:
        """Fill `out` [R, ...] with the rows from `start` on, all of one shard, whose file has `file_bytes` bytes.

        Raises CorruptArtefactError when a checksum does not match or a chunk is missing.
        """
        shard, first = divmod(start, self.shard_rows)
        done = 0
        while done < len(out):
            chunk, skip = divmod(first + done, self.chunk_rows)
            count = min(self.chunk_rows - skip, len(out) - done)
            if count == self.chunk_rows:
                self._read_chunk(shard, chunk, out[done : done + count], file_bytes)
            else:
                whole = np.empty((self.chunk_rows, *self.row_shape), self.dtype)
                self._read_chunk(shard, chunk, whole, file_bytes)
                out[done : done + count] = whole[skip : skip + count]
            done += count

    def _read_chunk(self, shard: int, chunk: int, out: npt.NDArray[Any], file_bytes: int) -> None:
        offset, length = (int(value) for value in self._index(shard, file_bytes)[chunk])
        if offset == ABSENT:
            raise CorruptArtefactError(f"{self.storage}/{self.file(shard)}: chunk {chunk} was never written")
        target = out.reshape(-1).view(np.uint8)
        encoded = target if self.decoder is None else np.empty(length - CRC_BYTES, np.uint8)
        if length != encoded.nbytes + CRC_BYTES:
            raise CorruptArtefactError(f"{self.storage}/{self.file(shard)}: chunk {chunk} has {length} bytes")
        self._checked(shard, offset, encoded, f"chunk {chunk}")
        if self.decoder:
            try:
                self.decoder.decode(encoded, target)
            except (RuntimeError, ValueError) as error:
                raise CorruptArtefactError(f"{self.storage}/{self.file(shard)}: chunk {chunk}: {error}") from None

    def _index(self, shard: int, file_bytes: int) -> npt.NDArray[np.uint64]:
        """Offset and bytes of every chunk of a shard, read from the end of its file."""
        index = self._indices.get(shard)
        if index is None:
            index = np.empty((self.shard_rows // self.chunk_rows, 2), "<u8")
            offset = file_bytes - index.nbytes - CRC_BYTES
            self._checked(shard, offset, index.reshape(-1).view(np.uint8), "index")
            self._indices[shard] = index
        return index

    def _checked(self, shard: int, offset: int, target: npt.NDArray[np.uint8], what: str) -> None:
        """Fill `target` from the shard's file, and compare it with the checksum that follows it in the file."""
        stored = np.empty(CRC_BYTES, np.uint8)
        try:
            self.storage.read_into(self.file(shard), offset, [target, stored])
        except (FileNotFoundError, EOFError) as error:
            raise CorruptArtefactError(f"{self.storage}/{self.file(shard)}: {what} cannot be read: {error}") from None
        if google_crc32c.value(target) != int(stored.view("<u4")[0]):
            raise CorruptArtefactError(f"{self.storage}/{self.file(shard)}: {what} does not match its checksum")
