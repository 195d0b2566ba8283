"""Writes the shards of a store. A shard's commit record appears only when all files of the shard are on disk."""

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import google_crc32c
import numpy.typing as npt
import torch
import zarr

from pipeline.artefacts.storage import Storage
from pipeline.errors import CorruptArtefactError, PipelineError
from pipeline.runtime.linalg import vector_norm
from pipeline.store import format as fmt
from pipeline.store.commits import MASSIVE, Commit, FileCheck, LayerNorms, commit_name
from pipeline.store.direct import raw_shard, stored_checksums
from pipeline.store.format import ShardRows
from pipeline.store.text_arrays import REMEDY


def activation_norms(rows_RD: torch.Tensor) -> torch.Tensor:
    """||x|| of every activation x, float64 [R], summed in float32."""
    # In parts, because a whole shard in float32 would take twice its memory.
    norm_R = torch.cat([vector_norm(part_RD.float(), dim=1) for part_RD in torch.split(rows_RD, 1024)]).double()
    overflown = (~norm_R.isfinite()).nonzero().squeeze(1)  # norms above 1.8e19, and rows that are not finite
    norm_R[overflown] = vector_norm(rows_RD[overflown].double(), dim=1)
    return norm_R


@dataclass(frozen=True)
class InPlace:
    """A layer of a shard whose file is in place, and what the commit says of it."""

    check: FileCheck
    norms: LayerNorms


class ShardWriter:
    """Writes shards into a laid-out store. Several processes may write different shards of it at the same time."""

    def __init__(self, storage: Storage):
        self.storage = storage
        self.layout = fmt.read_layout(storage)
        # zarr encodes a shard into memory. `Storage.write` writes it whole and syncs it, which zarr does not.
        self.group, self.files = fmt.skeleton(self.layout)
        self.encoding = threading.Lock()
        """Held while zarr encodes: threads that write different shards share the memory that it encodes into."""

    def missing(self) -> list[int]:
        """Shards that the store is to have and that are not committed yet."""
        committed = self.storage.sizes(fmt.COMMITS)
        return [shard for shard in self.layout.present if commit_name(shard) not in committed]

    def committed(self, shard: int) -> bool:
        """Whether a shard is committed, by whichever process."""
        return self.storage.size(commit_name(shard)) is not None

    def write(
        self,
        shard: int,
        rows: ShardRows,
        there: Mapping[int, InPlace] | None = None,
        *,
        assured: Callable[[], None] = lambda: None,
    ) -> Commit:
        """Write all rows of a shard, then commit it. The layers in `there` have their files already.

        `assured` raises if this process may no longer replace a file, since another machine has taken over the shard.

        Raises TypeError for another dtype or shape than the store's, because Zarr would silently convert the bit patterns as
        if they were numbers. Raises PipelineError for values that are not finite and for a full disk, and
        CorruptArtefactError where another writer committed other bytes; the shard then counts as not committed.
        """
        layout = self.layout
        start, stop = layout.shard_range(shard)
        written = len(rows.fields.sequence)
        bits = fmt.BITS[layout.dtype]
        norms = {layer: known.norms for layer, known in (there or {}).items()}
        checks = {fmt.layer_file(layer, shard): known.check for layer, known in (there or {}).items()}
        for layer in (layer for layer in layout.layers if layer not in norms):
            rows_RD = rows.layers[layer]
            if rows_RD.dtype != bits.torch_dtype or rows_RD.shape != (written, layout.d_in) or written > stop - start:
                raise TypeError(f"layer {layer}: got {rows_RD.dtype} {tuple(rows_RD.shape)}, the store holds {layout.dtype}")
            norms[layer] = _norms(rows_RD, layer, rows.fields.sequence)
            checks |= self._put(fmt.layer_array(layer), start, bits.patterns(rows_RD.contiguous()), assured)
        for name, dtype in fmt.ROW_FIELDS.items():
            checks |= self._put(name, start, getattr(rows.fields, name).astype(dtype, casting="same_kind"), assured)
        commit = Commit(shard=shard, rows=written, files=checks, norms=norms)
        record = commit.record()
        # `create` never replaces a record: of two writers the first wins. On equal machines both wrote the same bytes.
        if not self.storage.create(commit_name(shard), record) and self.storage.read(commit_name(shard)) != record:
            self.storage.delete(commit_name(shard))  # it vouches for the other writer's files, which are now overwritten
            raise CorruptArtefactError(
                f"{self.storage}: shard {shard} was written by two machines that compute different bytes; {REMEDY}"
            )
        return commit

    def _put(self, name: str, start: int, values: npt.NDArray[Any], assured: Callable[[], None]) -> dict[str, FileCheck]:
        """Encode the rows of one array and write their file; returns its name and checksum."""
        made, content = self._encoded(name, start, values)
        # What is there is of a run that was killed, or of a machine that took over this shard and may have committed it.
        if not self.storage.create(made, content.data) and memoryview(self.storage.read(made)) != content.data:
            assured()
            self.storage.write(made, content.data)
        checksum = cast("int", google_crc32c.value(content))  # google_crc32c has no types
        chunks = stored_checksums(content, self.layout.shard_rows // self.layout.chunk_rows)
        return {made: FileCheck(bytes=content.nbytes, crc32c=checksum, chunks=chunks)}

    def _encoded(self, name: str, start: int, values: npt.NDArray[Any]) -> tuple[str, fmt.Integers]:
        """Name and content of the file."""
        layout = self.layout
        if layout.codec == "raw" and name not in fmt.ROW_FIELDS:
            fill = fmt.BITS[layout.dtype].fill
            return f"{name}/c/{start // layout.shard_rows}/0", raw_shard(values, layout.shard_rows, layout.chunk_rows, fill)
        with self.encoding:
            cast("zarr.Array[Any]", self.group[name])[start : start + len(values)] = values
            (made,) = [file for file in self.files if not file.endswith(fmt.ROOT)]
            return made, cast("fmt.Integers", self.files.pop(made).as_numpy_array())


def _norms(rows_RD: torch.Tensor, layer: int, sequence_R: fmt.Integers) -> LayerNorms:
    norm_R = activation_norms(rows_RD)
    if not norm_R.isfinite().all():
        first = int(sequence_R[int((~norm_R.isfinite()).nonzero()[0])])
        raise PipelineError(
            f"layer {layer}: the model put out values that are not finite for sequence {first} of the store; "
            f'set model.dtype = "float32" if it runs in another'
        )
    return summed(norm_R)


def summed(norm_R: torch.Tensor) -> LayerNorms:
    """What a commit records of the norms of a layer's rows."""
    median = norm_R.median().item()
    massive_R = norm_R[norm_R > MASSIVE * median]
    return LayerNorms(
        sum_squares=_squares(norm_R),
        median=median,
        max=norm_R.max().item(),
        massive=len(massive_R),
        massive_squares=_squares(massive_R),
    )


def _squares(norm_R: torch.Tensor) -> float:
    return math.fsum(cast("list[float]", (norm_R**2).tolist()))
