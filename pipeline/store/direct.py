"""Reads chunks of a sharded Zarr array straight into the caller's buffer, and makes raw shards, without zarr-python.

zarr-python reads and writes the same files (tests compare both), but takes several times as long: it reads a shard's index
on every call, and copies a chunk once per codec. Here each index is read once, and a raw chunk is copied once.
"""

import json
from typing import Any, cast

import google_crc32c
import numcodecs
import numpy as np
import numpy.typing as npt
from numcodecs.abc import Codec

from pipeline.artefacts.storage import Storage
from pipeline.errors import CorruptArtefactError
from pipeline.store import format as fmt
from pipeline.store.commits import FileCheck
from pipeline.store.text_arrays import REMEDY

CRC_BYTES = 4
ENTRY_BYTES = 16
"""Offset and bytes of a chunk in a shard's index."""
ABSENT = 2**64 - 1
"""Offset in a shard's index of a chunk that was never written."""
DECODERS: dict[str, Codec] = {"blosc": numcodecs.Blosc(), "zstd": numcodecs.Zstd()}


def stored_checksums(content: npt.NDArray[Any], chunks: int) -> str:
    """The checksums that stand in a shard's file, of its `chunks` chunks and then of its index, as `FileCheck` lists them.

    Each follows what it is of, as four bytes. A chunk that was never written has zeros. Raises ValueError for a file that is
    no shard.
    """
    content = content.reshape(-1).view(np.uint8)
    index = content[-chunks * ENTRY_BYTES - CRC_BYTES : -CRC_BYTES].tobytes()
    offsets = np.frombuffer(index, "<u8").reshape(chunks, 2)
    ends = [0 if offset == ABSENT else offset + length for offset, length in offsets.tolist()]
    if any(end > len(content) for end in ends):
        raise ValueError("its index points behind its end")
    ends.append(len(content))
    stored = [content[end - CRC_BYTES : end].tobytes() if end else bytes(CRC_BYTES) for end in ends]
    return "".join(f"{int.from_bytes(checksum, 'little'):08x}" for checksum in stored)


def is_committed(content: bytes, check: FileCheck, chunks: int) -> bool:
    """Whether the file of a shard of `chunks` chunks fits its own checksums, and those are the committed ones."""
    values = np.frombuffer(content, np.uint8)
    try:
        stored = check.chunks and stored_checksums(values, chunks)
    except ValueError:
        return False
    checksum = cast("int", google_crc32c.value(values))  # google_crc32c has no types
    return checksum == check.crc32c and stored == check.chunks


def raw_shard(values_RD: npt.NDArray[Any], shard_rows: int, chunk_rows: int, fill: int) -> npt.NDArray[np.uint8]:
    """The file of a shard of raw chunks, byte for byte as zarr-python writes it.

    The last chunk that has rows is filled up with `fill`, and chunks behind it are absent.
    """
    chunks, used = shard_rows // chunk_rows, -(-len(values_RD) // chunk_rows)
    chunk_bytes = chunk_rows * values_RD[:1].nbytes
    content = np.empty(used * (chunk_bytes + CRC_BYTES) + chunks * ENTRY_BYTES + CRC_BYTES, np.uint8)
    index = np.full((chunks, 2), ABSENT, "<u8")
    for chunk in range(used):
        start = chunk * (chunk_bytes + CRC_BYTES)
        index[chunk] = start, chunk_bytes + CRC_BYTES
        rows = values_RD[chunk * chunk_rows : (chunk + 1) * chunk_rows]
        target = content[start : start + chunk_bytes].view(values_RD.dtype).reshape(chunk_rows, *values_RD.shape[1:])
        target[: len(rows)], target[len(rows) :] = rows, fill
        _seal(content[start : start + chunk_bytes + CRC_BYTES])
    end = content[used * (chunk_bytes + CRC_BYTES) :]
    end[:-CRC_BYTES] = index.reshape(-1).view(np.uint8)
    _seal(end)
    return content


def _seal(part: npt.NDArray[np.uint8]) -> None:
    """Put the checksum of all but its last bytes there."""
    part[-CRC_BYTES:] = np.array([google_crc32c.value(part[:-CRC_BYTES])], "<u4").view(np.uint8)


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
        except fmt.UNREADABLE as error:
            raise CorruptArtefactError(f"{storage}/{name}/zarr.json cannot be read: {error!r}; {REMEDY}") from None

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

    def fits(self, layout: fmt.Layout, layer: bool) -> bool:
        """Whether these are the rows of a layer, or a row field, of this layout. Other numbers would be read as data."""
        shape = (layout.shard_rows, layout.chunk_rows, (layout.d_in,) if layer else ())
        dtype = fmt.BITS[layout.dtype].name if layer else fmt.ROW_FIELDS.get(cast("fmt.RowField", self.name))
        return (self.shard_rows, self.chunk_rows, self.row_shape) == shape and self.dtype.name == dtype

    def file(self, shard: int) -> str:
        """Name of a shard's file."""
        return f"{self.name}/c/{shard}" + "/0" * len(self.row_shape)

    def read(self, start: int, out: npt.NDArray[Any], check: FileCheck) -> None:
        """Fill `out` [R, ...] with the rows from `start` on, all of one shard, whose file has this record in the commit.

        Raises CorruptArtefactError when a checksum does not match or a chunk is missing, and when the file fits its own
        checksums but is another one than was committed.
        """
        shard, first = divmod(start, self.shard_rows)
        done = 0
        while done < len(out):
            chunk, skip = divmod(first + done, self.chunk_rows)
            count = min(self.chunk_rows - skip, len(out) - done)
            if count == self.chunk_rows:
                self._read_chunk(shard, chunk, out[done : done + count], check)
            else:
                whole = np.empty((self.chunk_rows, *self.row_shape), self.dtype)
                self._read_chunk(shard, chunk, whole, check)
                out[done : done + count] = whole[skip : skip + count]
            done += count

    def _read_chunk(self, shard: int, chunk: int, out: npt.NDArray[Any], check: FileCheck) -> None:
        offset, length = (int(value) for value in self._index(shard, check)[chunk])
        if offset == ABSENT:
            raise CorruptArtefactError(f"{self.storage}/{self.file(shard)}: chunk {chunk} was never written")
        target = out.reshape(-1).view(np.uint8)
        plain = target.nbytes + CRC_BYTES
        if (length != plain if self.decoder is None else length < CRC_BYTES) or offset + length > check.bytes:
            raise CorruptArtefactError(f"{self.storage}/{self.file(shard)}: chunk {chunk} has {length} bytes")
        encoded = target if self.decoder is None else np.empty(length - CRC_BYTES, np.uint8)
        self._checked(shard, offset, encoded, f"chunk {chunk}", _listed(check, chunk))
        if self.decoder:
            try:
                self.decoder.decode(encoded, target)
            except (RuntimeError, ValueError) as error:
                raise CorruptArtefactError(f"{self.storage}/{self.file(shard)}: chunk {chunk}: {error}") from None

    def _index(self, shard: int, check: FileCheck) -> npt.NDArray[np.uint64]:
        """Offset and bytes of every chunk of a shard, read from the end of its file."""
        index = self._indices.get(shard)
        if index is None:
            chunks = self.shard_rows // self.chunk_rows
            offset = check.bytes - chunks * ENTRY_BYTES - CRC_BYTES
            if offset < 0:
                raise CorruptArtefactError(f"{self.storage}/{self.file(shard)} is too small for {chunks} chunks")
            index = np.empty((chunks, 2), "<u8")
            self._checked(shard, offset, index.reshape(-1).view(np.uint8), "index", _listed(check, len(index)))
            self._indices[shard] = index
        return index

    def _checked(self, shard: int, offset: int, target: npt.NDArray[np.uint8], what: str, committed: int | None) -> None:
        """Fill `target` from the shard's file. Compare it with the checksum that follows it, and that with the commit's."""
        stored = np.empty(CRC_BYTES, np.uint8)
        try:
            self.storage.read_into(self.file(shard), offset, [target, stored])
        except (FileNotFoundError, EOFError) as error:
            raise CorruptArtefactError(f"{self.storage}/{self.file(shard)}: {what} cannot be read: {error}") from None
        checksum = int(stored.view("<u4")[0])
        if google_crc32c.value(target) != checksum:
            raise CorruptArtefactError(f"{self.storage}/{self.file(shard)}: {what} does not match its checksum")
        if committed not in (None, checksum):
            raise CorruptArtefactError(f"{self.storage}/{self.file(shard)}: {what} is not the one that was committed")


def _listed(check: FileCheck, part: int) -> int | None:
    """The checksum of a chunk, or after the last chunk that of the index, in the commit; None where it lists none."""
    digits = check.chunks and check.chunks[8 * part : 8 * part + 8]
    return int(digits, 16) if digits else None
