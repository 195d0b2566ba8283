"""Writing a store: one shard at a time, each committed by a record that appears only when all its files are on disk.

Shapes: R rows of one shard, D d_in.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import google_crc32c
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict

from pipeline.errors import PipelineError
from pipeline.identity import canonical_json
from pipeline.store import format as fmt
from pipeline.workspace import fsync


class FileCheck(BaseModel):
    """Size and checksum of one committed file."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    crc32c: int


class Commit(BaseModel):
    """`commits/000017.json`: the proof that a shard is complete."""

    model_config = ConfigDict(frozen=True)

    shard: int
    rows: int
    files: dict[str, FileCheck]
    sum_squares: dict[int, float]
    """Per layer, the sum of squares of the shard's stored values, from which the scale of a store follows."""


def commit_path(folder: Path, shard: int) -> Path:
    """Where the commit record of a shard lies."""
    return folder / fmt.COMMITS / f"{shard:06d}.json"


class ShardWriter:
    """Fills a laid-out store. Several processes may each write other shards of it at the same time."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.group, self.layout = fmt.open_group(folder, mode="r+")

    def missing(self) -> list[int]:
        """Shards that are not committed yet."""
        return [shard for shard in range(self.layout.shards) if not commit_path(self.folder, shard).exists()]

    def write(self, shard: int, layers: Mapping[int, torch.Tensor], row_fields: Mapping[str, np.ndarray]) -> None:
        """Write one whole shard in its final row order, then commit it.

        `layers` maps each layer to its rows [R, D] in the store's dtype on the CPU, `row_fields` each name of ROW_FIELDS to
        [R]. Raises TypeError for another dtype, because Zarr would convert the bits by value without a word, and
        PipelineError for values that are not finite.
        """
        layout = self.layout
        start, stop = layout.shard_range(shard)
        bits = fmt.BITS[layout.dtype]
        for name in fmt.shard_files(layout, shard):
            # What an interrupted writer left may be torn, and zarr would try to merge it with the new rows.
            (self.folder / name).unlink(missing_ok=True)
        sum_squares: dict[int, float] = {}
        for layer in layout.layers:
            rows_RD = layers[layer]
            if rows_RD.dtype != bits.torch_dtype or rows_RD.shape != (stop - start, layout.d_in):
                raise TypeError(f"layer {layer}: got {rows_RD.dtype} {tuple(rows_RD.shape)}, the store holds {layout.dtype}")
            # In parts, because a whole shard in float64 is four times its size.
            sum_squares[layer] = sum(part.double().square().sum().item() for part in rows_RD.split(layout.chunk_rows))
            if not math.isfinite(sum_squares[layer]):
                raise PipelineError(
                    f"layer {layer}, shard {shard}: the model put out values that are not finite; "
                    f'set model.dtype = "float32" if it runs in another'
                )
            fmt.array(self.group, fmt.layer_array(layer))[start:stop] = rows_RD.contiguous().view(bits.view).numpy()
        for name, dtype in fmt.ROW_FIELDS.items():
            fmt.array(self.group, name)[start:stop] = row_fields[name].astype(dtype, casting="same_kind")
        self._commit(shard, stop - start, sum_squares)

    def _commit(self, shard: int, rows: int, sum_squares: dict[int, float]) -> None:
        files: dict[str, FileCheck] = {}
        for name in fmt.shard_files(self.layout, shard):
            path = self.folder / name
            fsync(path)
            fsync(path.parent)
            content = path.read_bytes()
            files[name] = FileCheck(bytes=len(content), crc32c=google_crc32c.value(content))
        commit = Commit(shard=shard, rows=rows, files=files, sum_squares=sum_squares)
        final = commit_path(self.folder, shard)
        temporary = final.with_suffix(f".{os.getpid()}.partial")
        temporary.write_text(canonical_json(json.loads(commit.model_dump_json())), encoding="utf-8")
        fsync(temporary)
        try:
            # A link cannot replace an existing record: the first of two writers wins, and both wrote the same bytes.
            os.link(temporary, final)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
        fsync(final.parent)
