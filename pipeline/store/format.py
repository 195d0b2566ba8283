"""The layout of an activation store on disk, and its creation. docs/store-format.md describes it for other readers.

Shapes: S sequences, L tokens per sequence, N documents, D d_in.
"""

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import zarr
from pydantic import BaseModel, ConfigDict
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer, default_buffer_prototype
from zarr.storage import MemoryStore

from pipeline.artefacts.storage import Storage, read_many
from pipeline.errors import CorruptArtefactError
from pipeline.section import Dtype
from pipeline.store.codecs import CODECS, Codec

FORMAT = "dasae-activations/2"
REMEDY = "repair it with the command that made it, `dasae extract EXPERIMENT --deep`"
UNREADABLE = (ValueError, TypeError, KeyError, RuntimeError, FileNotFoundError)
"""What zarr and the parsers raise for metadata, checksums and compressed bytes that are not as they were written."""
COMMITS = "commits"
ROOT = "zarr.json"
ROW_FIELDS = {"doc_id": "int64", "sequence": "int32", "position": "int32", "token_id": "int32"}
"""Arrays that say of every row where it comes from, in the same row order as the layers."""


@dataclass(frozen=True)
class Bits:
    """How a floating-point dtype that zarr 3.1 may not know is kept: its bit pattern in an unsigned integer."""

    torch_dtype: torch.dtype
    view: torch.dtype
    name: str
    fill: int
    """All ones, a NaN in either dtype: rows that were never written cannot pass for activations."""


BITS: dict[Dtype, Bits] = {
    "bfloat16": Bits(torch.bfloat16, torch.uint16, "uint16", 0xFFFF),
    "float32": Bits(torch.float32, torch.uint32, "uint32", 0xFFFFFFFF),
}


class Layout(BaseModel):
    """The attributes of a store's root group: all that a reader must know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["dasae-activations/2"] = FORMAT
    rows: int
    """Rows there is text for; arrays are padded up to whole shards."""
    shard_rows: int
    chunk_rows: int
    layers: tuple[int, ...]
    d_in: int
    dtype: Dtype
    codec: Codec
    row_order: Literal["shuffled", "document"]
    """`shuffled`: rows permuted inside each shard. `document`: as in the text (probe stores)."""
    seed: int
    """Seed of the permutations, or of a synthetic store's rows."""
    special_ids: tuple[int, ...]
    """Token ids that never become rows (BOS, EOS, padding, ...)."""
    max_norm: float | None = None
    """Rows whose norm is more than this multiple of their shard's median norm, in any layer, are left out."""
    provenance: dict[str, Any]
    """Model, corpus and tokenizer this was extracted from."""
    classes: tuple[str, ...] = ()
    """Names of the labels of a probe store."""

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First row of a shard and one past the last row that it has text for."""
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """The tokens of a store, before any forward pass."""

    tokens_SL: np.ndarray
    """int32; a BOS first, padding only on the right."""
    row_offsets: np.ndarray
    """int64 [S + 1]: the rows of sequence s are row_offsets[s] to row_offsets[s + 1], before shuffling."""
    doc_starts: np.ndarray
    """int64 [N]: where each document starts in `tokens_SL.ravel()`."""


@dataclass(frozen=True, kw_only=True)
class NewStore:
    """All that determines a store's files before the first forward pass."""

    layout: Layout
    sequences: Sequences
    labels: dict[str, np.ndarray] = field(default_factory=dict)
    """Further arrays with one entry per document: `label` and `split` of a probe store."""


def layer_array(layer: int) -> str:
    """Name of the array that holds a layer's rows."""
    return f"layer_{layer:02d}"


def create(storage: Storage, new: NewStore) -> None:
    """Lay out an empty store whose tokens are complete; afterwards every shard can be filled independently.

    The root's `zarr.json` is written last, so that a store interrupted here is recognised as not laid out yet. Equal
    arguments write equal files: several processes may do it at once.
    """
    group, files = skeleton(new.layout)
    text = new.sequences
    whole = {"tokens": text.tokens_SL, "row_offsets": text.row_offsets, "doc_starts": text.doc_starts}
    for name, values in (whole | new.labels).items():
        chunks = (min(len(values), 8192), *values.shape[1:])
        group.create_array(
            name,
            data=values,
            chunks=chunks,
            compressors=[ZstdCodec(level=1), Crc32cCodec()],
            # Left out by default, a chunk of zeros could not be told from one that was lost.
            config={"write_empty_chunks": True},
        )
    for name in sorted(files, key=lambda name: (name == ROOT, name)):
        storage.write(name, files[name].as_numpy_array().data)


def skeleton(layout: Layout) -> tuple[zarr.Group, dict[str, Buffer]]:
    """The group and the row arrays of a store without any data, in memory, and the files that writing to it makes."""
    files: dict[str, Buffer] = {}
    attributes = layout.model_dump(mode="json")
    group = zarr.open_group(MemoryStore(files), mode="w", zarr_format=3, attributes=attributes)
    bits = BITS[layout.dtype]
    padded = layout.shards * layout.shard_rows
    # crc32c is the last codec, so that a flipped bit is found before the decompressor sees it.
    compressors = [*CODECS[layout.codec](bits.torch_dtype.itemsize), {"name": "crc32c"}]
    for layer in layout.layers:
        group.create_array(
            layer_array(layer),
            shape=(padded, layout.d_in),
            chunks=(layout.chunk_rows, layout.d_in),
            shards=(layout.shard_rows, layout.d_in),
            dtype=bits.name,
            fill_value=bits.fill,
            compressors=compressors,
            attributes={"logical_dtype": layout.dtype},
        )
    for name, dtype in ROW_FIELDS.items():
        group.create_array(
            name,
            shape=(padded,),
            chunks=(layout.chunk_rows,),
            shards=(layout.shard_rows,),
            dtype=dtype,
            fill_value=-1,
            compressors=[ZstdCodec(level=1), Crc32cCodec()],
        )
    return group, files


def read_sequences(storage: Storage) -> Sequences:
    """The tokens of a laid-out store. Raises CorruptArtefactError."""
    return Sequences(
        tokens_SL=read_whole(storage, "tokens"),
        row_offsets=read_whole(storage, "row_offsets"),
        doc_starts=read_whole(storage, "doc_starts"),
    )


def read_whole(storage: Storage, name: str) -> np.ndarray:
    """All of an array that has an entry per sequence or per document. Raises CorruptArtefactError."""
    names = list(storage.sizes(name))
    as_buffer = default_buffer_prototype().buffer.from_bytes
    files = {file: as_buffer(content) for file, content in zip(names, read_many(storage, names), strict=True)}
    try:
        whole = zarr.open_array(MemoryStore(files), path=name, mode="r")
        if whole.nchunks_initialized < whole.nchunks:  # zarr would fill the gap with zeros
            raise ValueError("a chunk is missing")
        return np.asarray(whole[:])
    except UNREADABLE as error:
        raise CorruptArtefactError(f"{storage}/{name} cannot be read: {error}; {REMEDY}") from None


def is_laid_out(storage: Storage) -> bool:
    """Whether `create` has finished here."""
    return storage.size(ROOT) is not None


def read_layout(storage: Storage) -> Layout:
    """What a store's root says of it. Raises CorruptArtefactError when there is no store of this format."""
    try:
        return Layout.model_validate(json.loads(storage.read(ROOT))["attributes"])
    except UNREADABLE:
        raise CorruptArtefactError(
            f"{storage} is not an activation store of format {FORMAT}: its {ROOT} is missing, damaged or of another format"
        ) from None


def text_arrays(layout: Layout) -> list[str]:
    """Names of the arrays that are there before any row."""
    return ["tokens", "row_offsets", "doc_starts", *(("label", "split") if layout.classes else ())]


def shard_files(layout: Layout, shard: int) -> list[str]:
    """Paths, relative to the store, of the files that together hold one shard."""
    return [f"{layer_array(layer)}/c/{shard}/0" for layer in layout.layers] + [f"{name}/c/{shard}" for name in ROW_FIELDS]
