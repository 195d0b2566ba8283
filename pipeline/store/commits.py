"""The commit record of a shard: what it says, and whether it can be believed. It is small and read whole."""

import json
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field

from pipeline.artefacts.identity import canonical_json, is_sealed, sealed
from pipeline.store import format as fmt

MASSIVE = 10.0
"""Multiple of the median norm above which an activation is massive: an attention sink (Sun et al. 2024)."""

LARGEST_RATIO = 1024
"""Plain bytes of a layer's rows as a multiple of their file's, at most: bounds the memory that a store can ask for."""

Count = Annotated[int, Field(ge=0)]
Norm = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class FileCheck(BaseModel):
    """Size and checksums of one committed file."""

    model_config = ConfigDict(frozen=True)

    bytes: Count
    crc32c: Count
    """Of the whole file. It proves that the file fits its own checksums, and says nothing about which file it is: a chunk
    followed by its own CRC32C leaves the register in a state that does not depend on the chunk."""
    chunks: Annotated[str, Field(pattern=r"^([0-9a-f]{8})*$")] | None = None
    """CRC32C of each chunk, then of the shard's index, eight hexadecimal digits each: they say which file it is. None in
    records of earlier versions."""


class LayerNorms(BaseModel):
    """Norms ||x|| of the stored activations of one layer in one shard."""

    model_config = ConfigDict(frozen=True)

    sum_squares: Norm
    """Sum of ||x||^2; the scale of a store follows from it."""
    median: Norm
    max: Norm
    massive: Count
    """Rows with more than MASSIVE times the median."""
    massive_squares: Norm | None = None
    """Their part of `sum_squares`; None in records of earlier versions."""


class Commit(BaseModel):
    """The record `commits/000017.json`, which proves that shard 17 is complete."""

    model_config = ConfigDict(frozen=True)

    shard: int
    rows: Annotated[int, Field(ge=1)]
    """Rows written, without those that `max_norm` leaves out."""
    files: dict[str, FileCheck]
    norms: dict[int, LayerNorms]
    """By layer."""

    def record(self) -> bytes:
        """The file's content: canonical JSON with a seal, without the fields that are None."""
        fields = cast("dict[str, Any]", json.loads(self.model_dump_json(exclude_none=True)))
        return canonical_json(sealed(fields)).encode()


def commit_name(shard: int) -> str:
    """Name of the commit record of a shard."""
    return f"{fmt.COMMITS}/{shard:06d}.json"


def read_commit(content: bytes, shard: int, layout: fmt.Layout) -> Commit:
    """The commit of a shard, believed only if it is as it was sealed and of this shard of this layout.

    Raises ValueError, whose message is the end of a sentence about the record.
    """
    try:
        commit = Commit.model_validate_json(content)
        unchanged = is_sealed(json.loads(content))
    except (ValueError, RecursionError):
        raise ValueError("cannot be read") from None
    start, stop = layout.shard_range(shard)
    if not unchanged:
        raise ValueError("was changed after it was written")
    if commit.shard != shard or commit.rows > stop - start:
        raise ValueError(f"is of another shard: it has number {commit.shard} and {commit.rows} rows")
    if set(commit.files) != set(fmt.shard_files(layout, shard)) or set(commit.norms) != set(layout.layers):
        raise ValueError("names other files or layers than the store has")
    plain = (
        -(-commit.rows // layout.chunk_rows) * layout.chunk_rows * layout.d_in * fmt.BITS[layout.dtype].torch_dtype.itemsize
    )
    layers = fmt.shard_files(layout, shard)[: len(layout.layers)]
    if any(plain > LARGEST_RATIO * commit.files[file].bytes for file in layers):
        raise ValueError(f"has files too small for {commit.rows} rows of d_in {layout.d_in}")
    return commit
