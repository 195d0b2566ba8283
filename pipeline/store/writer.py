"""Writing a store: one shard at a time, each committed by a record that appears only when all its files are on disk.

Shapes: R rows of one shard, D d_in.
"""

import json
import math
from collections.abc import Mapping
from typing import cast

import google_crc32c
import numpy as np
import torch
import zarr
from pydantic import BaseModel, ConfigDict

from pipeline.artefacts.identity import canonical_json
from pipeline.artefacts.storage import Storage
from pipeline.errors import CorruptArtefactError, PipelineError
from pipeline.store import format as fmt

MASSIVE = 10.0
"""Multiple of the median norm from which a row counts as massive: an attention sink (Sun et al. 2024), not a meaning."""


class FileCheck(BaseModel):
    """Size and checksum of one committed file."""

    model_config = ConfigDict(frozen=True)

    bytes: int
    crc32c: int


class LayerNorms(BaseModel):
    """Norms ||x|| of the rows of one layer in one shard, from the stored values."""

    model_config = ConfigDict(frozen=True)

    sum_squares: float
    """Sum of ||x||^2, from which the scale of a store follows."""
    median: float
    max: float
    massive: int
    """Rows with more than MASSIVE times the median."""


class Commit(BaseModel):
    """`commits/000017.json`: the proof that a shard is complete."""

    model_config = ConfigDict(frozen=True)

    shard: int
    rows: int
    """Rows written; fewer than the shard has text for where massive rows were left out."""
    files: dict[str, FileCheck]
    norms: dict[int, LayerNorms]
    """By layer."""


def commit_name(shard: int) -> str:
    """Name of the commit record of a shard."""
    return f"{fmt.COMMITS}/{shard:06d}.json"


def row_norms(rows_RD: torch.Tensor) -> torch.Tensor:
    """||x|| of every row, float64 [R], from sums in float32."""
    # In parts, because a whole shard in float32 is twice its size.
    norm_R = torch.cat([torch.linalg.vector_norm(part_RD.float(), dim=1) for part_RD in rows_RD.split(1024)]).double()
    overflown = (~norm_R.isfinite()).nonzero().squeeze(1)  # from 1.8e19 on, or not finite to begin with
    norm_R[overflown] = torch.linalg.vector_norm(rows_RD[overflown].double(), dim=1)
    return norm_R


class ShardWriter:
    """Fills a laid-out store. Several processes may each write other shards of it at the same time."""

    def __init__(self, storage: Storage):
        self.storage = storage
        self.layout = fmt.read_layout(storage)
        # zarr encodes a shard into memory, and `Storage.write` puts it down whole and synced, which zarr would not.
        self.group, self.files = fmt.skeleton(self.layout)

    def missing(self) -> list[int]:
        """Shards that are not committed yet."""
        committed = self.storage.sizes(fmt.COMMITS)
        return [shard for shard in range(self.layout.shards) if commit_name(shard) not in committed]

    def committed(self, shard: int) -> bool:
        """Whether a shard is committed now."""
        return self.storage.size(commit_name(shard)) is not None

    def write(self, shard: int, layers: Mapping[int, torch.Tensor], row_fields: Mapping[str, np.ndarray]) -> Commit:
        """Write one whole shard in its final row order, then commit it.

        `layers` maps each layer to its rows [R, D] in the store's dtype on the CPU, `row_fields` each name of ROW_FIELDS to
        [R]. Raises TypeError for another dtype, because Zarr would convert the bits by value without a word, and
        PipelineError for values that are not finite, a disk that is full, or a record of other bytes by another writer, upon
        which the shard counts as not committed.
        """
        layout = self.layout
        start, stop = layout.shard_range(shard)
        rows = len(row_fields["sequence"])
        bits = fmt.BITS[layout.dtype]
        norms: dict[int, LayerNorms] = {}
        checks: dict[str, FileCheck] = {}
        for layer in layout.layers:
            rows_RD = layers[layer]
            if rows_RD.dtype != bits.torch_dtype or rows_RD.shape != (rows, layout.d_in) or rows > stop - start:
                raise TypeError(f"layer {layer}: got {rows_RD.dtype} {tuple(rows_RD.shape)}, the store holds {layout.dtype}")
            norms[layer] = _norms(rows_RD, layer, row_fields["sequence"])
            checks |= self._put(fmt.layer_array(layer), start, rows_RD.contiguous().view(bits.view).numpy())
        for name, dtype in fmt.ROW_FIELDS.items():
            checks |= self._put(name, start, row_fields[name].astype(dtype, casting="same_kind"))
        commit = Commit(shard=shard, rows=rows, files=checks, norms=norms)
        record = canonical_json(json.loads(commit.model_dump_json())).encode()
        # Never replaces a record: of two writers the first wins, and on equal machines both wrote the same bytes.
        if not self.storage.create(commit_name(shard), record) and self.storage.read(commit_name(shard)) != record:
            self.storage.delete(commit_name(shard))  # it vouches for files that are now this writer's
            raise CorruptArtefactError(
                f"{self.storage}: shard {shard} was written by two machines that compute different bytes; {fmt.REMEDY}"
            )
        return commit

    def _put(self, name: str, start: int, values: np.ndarray) -> dict[str, FileCheck]:
        """Encode the rows of one array and write the file; its name and checksum."""
        cast("zarr.Array", self.group[name])[start : start + len(values)] = values
        (made,) = [file for file in self.files if not file.endswith(fmt.ROOT)]
        content = self.files.pop(made).as_numpy_array()
        self.storage.write(made, content.data)
        return {made: FileCheck(bytes=content.nbytes, crc32c=google_crc32c.value(content))}


def _norms(rows_RD: torch.Tensor, layer: int, sequence_R: np.ndarray) -> LayerNorms:
    norm_R = row_norms(rows_RD)
    if not norm_R.isfinite().all():
        worst = int(sequence_R[int((~norm_R.isfinite()).nonzero()[0])])
        raise PipelineError(
            f"layer {layer}: the model put out values that are not finite for sequence {worst} of the store; "
            f'set model.dtype = "float32" if it runs in another'
        )
    median = norm_R.median().item()
    return LayerNorms(
        sum_squares=math.fsum((norm_R**2).tolist()),
        median=median,
        max=norm_R.max().item(),
        massive=int((norm_R > MASSIVE * median).sum()),
    )
