"""Reads a store. Opening it checks that all files exist and have their sizes; reading checks the checksum of every chunk."""

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import zarr

from pipeline.artefacts.identity import sha256
from pipeline.artefacts.storage import Storage, open_storage, read_many
from pipeline.errors import BadInputError, CorruptArtefactError
from pipeline.store import format as fmt
from pipeline.store.commits import Commit, commit_name, read_commit
from pipeline.store.direct import ShardedArray
from pipeline.store.norms import scale
from pipeline.store.text_arrays import REMEDY, StoredArray, read_whole
from pipeline.store.verify import recorded_files


class ActivationStore:
    """An activation store, in a folder or at an `s3://` URL.

    Opening raises CorruptArtefactError when a shard is not committed, or when one of its files is missing or has another
    size; reading raises it when a checksum does not match. With `partial`, shards that are not committed are left out.
    """

    def __init__(self, place: Path | str | Storage, *, partial: bool = False):
        self.storage = open_storage(place)
        self._recorded = recorded_files(self.storage)
        records = self.storage.sizes(fmt.COMMITS)
        sizes = self.storage.sizes()  # listed second, so that it includes the files of a shard that is committed in between
        self._check_metadata(sizes)
        self.layout = fmt.read_layout(self.storage)
        self.commits = self._commits(records, sizes, partial)
        """By shard."""
        self._direct: dict[str, ShardedArray | None] = {}

    def _check_metadata(self, sizes: Mapping[str, int]) -> None:
        """Compare Zarr's metadata with the manifest's checksums; Zarr itself would not notice a changed number in it."""
        names = [name for name in self._recorded if name.endswith(fmt.ROOT)]
        for name in names:
            if sizes.get(name) != self._recorded[name].bytes:  # also a name outside the store, which is not listed
                raise CorruptArtefactError(f"{self.storage}/{name} {_unlike(name, self._recorded[name].bytes, sizes)}")
        for name, content in zip(names, read_many(self.storage, names), strict=True):
            self._compare(name, content)

    def _compare(self, name: str, content: bytes) -> None:
        if name in self._recorded and sha256(content) != self._recorded[name].sha256:
            raise CorruptArtefactError(f"{self.storage}/{name} does not match its checksum; {REMEDY}")

    def _commits(self, records: Mapping[str, int], sizes: Mapping[str, int], partial: bool) -> dict[int, Commit]:
        names = {shard: commit_name(shard) for shard in self.layout.present}
        there = {shard: name for shard, name in names.items() if name in records}
        if not partial and len(there) < len(names):
            lost = sorted(names.keys() - there.keys())
            raise CorruptArtefactError(f"{self.storage}: shards {_few(lost)} are not committed; {REMEDY}")
        commits: dict[int, Commit] = {}
        for shard, content in zip(there, read_many(self.storage, there.values()), strict=True):
            commits[shard] = self._commit(shard, content)
            for file, check in commits[shard].files.items():
                if sizes.get(file) != check.bytes:
                    raise CorruptArtefactError(f"{self.storage}/{file} {_unlike(file, check.bytes, sizes)}")
        return commits

    def _commit(self, shard: int, content: bytes) -> Commit:
        self._compare(commit_name(shard), content)
        try:
            return read_commit(content, shard, self.layout)
        except ValueError as error:
            raise CorruptArtefactError(f"{self.storage}/{commit_name(shard)} {error}; {REMEDY}") from None

    @property
    def shards(self) -> list[int]:
        """Numbers of the shards that can be read."""
        return list(self.commits)

    @property
    def every_shard(self) -> list[int]:
        """These, or in the store of a stream all shards, also those that are made while training."""
        return self.shards if self.layout.kept is None else list(range(self.layout.shards))

    @cached_property
    def rows(self) -> int:
        """Rows of these shards."""
        return sum(commit.rows for commit in self.commits.values())

    @cached_property
    def bytes(self) -> int:
        """Bytes of all files of these shards."""
        return sum(check.bytes for commit in self.commits.values() for check in commit.files.values())

    def scale(self, layer: int, shards: Iterable[int] | None = None) -> float:
        """The factor that makes E||x||^2 = 1 over some shards, by default all (docs/method.md, "The loss").

        Raises BadInputError for a layer that the store does not have.
        """
        self._check(layer)
        return scale(self.commits if shards is None else {shard: self.commits[shard] for shard in shards}, layer)

    def row_range(self, shard: int) -> tuple[int, int]:
        """First row of a shard and one past the last that was written; of a shard that is streamed, that it will have."""
        start, stop = self.layout.shard_range(shard)
        streamed = self.layout.kept is not None and shard not in self.commits
        return start, stop if streamed else start + self.commits[shard].rows

    def has(self, shard: int) -> bool:
        """Whether a shard can be read. One that was committed since the store was opened can, from now on."""
        if shard not in self.commits and (size := self.storage.size(commit_name(shard))):
            self.commits[shard] = self._commit(shard, self.storage.read(commit_name(shard), size))
        return shard in self.commits

    def rows_of(self, shards: Iterable[int]) -> int:
        """Rows of some shards, also of those that are streamed."""
        return sum(stop - start for start, stop in map(self.row_range, shards))

    def chunks(self, shards: Iterable[int]) -> list[tuple[int, int]]:
        """Bounds of every chunk of some shards, in order."""
        size = self.layout.chunk_rows
        ranges = [self.row_range(shard) for shard in shards]
        return [(first, min(first + size, stop)) for start, stop in ranges for first in range(start, stop, size)]

    def read(self, layer: int, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Rows `start` to `stop` - 1 of a layer, [R, D] in the store's dtype, read into `out` (contiguous) if it is given.

        Raises BadInputError for a layer that the store does not have, IndexError for rows that were not written, and
        CorruptArtefactError for a chunk that does not match its checksum.
        """
        self._check(layer)
        bits = fmt.BITS[self.layout.dtype]
        if out is None:
            out = torch.empty(stop - start, self.layout.d_in, dtype=bits.torch_dtype)
        self._read_rows(fmt.layer_array(layer), start, stop, bits.patterns(out))
        return out

    def read_field(self, name: fmt.RowField, start: int, stop: int) -> fmt.Integers:
        """Rows `start` to `stop` - 1 of one of ROW_FIELDS, [R]. Raises what `read` does."""
        values: fmt.Integers = np.empty(stop - start, fmt.ROW_FIELDS[name])
        self._read_rows(name, start, stop, values)
        return values

    def whole(self, name: str) -> npt.NDArray[Any]:
        """One of the arrays with an entry per sequence or document, all of it. Raises CorruptArtefactError."""
        return read_whole(self.storage, name, self._compare)

    def array(self, name: str) -> StoredArray:
        """One of the same arrays, to be read in parts. Raises CorruptArtefactError."""
        return StoredArray(self.storage, name, self._compare)

    def _check(self, layer: int) -> None:
        if layer not in self.layout.layers:
            raise BadInputError(f"{self.storage} has no layer {layer}; it has {', '.join(map(str, self.layout.layers))}")

    def _read_rows(self, name: str, start: int, stop: int, out: npt.NDArray[Any]) -> None:
        if name not in self._direct:
            self._direct[name] = self._opened(name)
        direct, position = self._direct[name], start
        while position < stop:
            shard = position // self.layout.shard_rows
            end = min(stop, (shard + 1) * self.layout.shard_rows)
            if shard not in self.commits or end > self.row_range(shard)[1]:
                raise IndexError(f"{self.storage}: rows {position} to {end} were not written")
            part = out[position - start : end - start]
            if direct:
                try:
                    direct.read(position, part, self.commits[shard].files[direct.file(shard)])
                except CorruptArtefactError as error:
                    raise CorruptArtefactError(f"{error}; {REMEDY}") from None
            else:
                part[:] = self._by_zarr(name, position, end)
            position = end

    def _opened(self, name: str) -> ShardedArray | None:
        direct = ShardedArray.open(self.storage, name)
        if direct and not direct.fits(self.layout, layer=name not in fmt.ROW_FIELDS):
            raise CorruptArtefactError(f"{self.storage}/{name}/{fmt.ROOT} is of another layout than the store; {REMEDY}")
        return direct

    def _by_zarr(self, name: str, start: int, stop: int) -> npt.NDArray[Any]:
        try:
            return np.asarray(zarr.open_array(self.storage.zarr_store(), path=name, mode="r")[start:stop])
        except (*fmt.UNREADABLE, MemoryError) as error:
            raise CorruptArtefactError(f"{self.storage}/{name} cannot be read: {error}; {REMEDY}") from None


def _unlike(file: str, known: int, sizes: Mapping[str, int]) -> str:
    found = f"has {sizes[file]} bytes instead of {known}" if file in sizes else "is missing"
    return f"{found}; {REMEDY}"


def _few(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:5])) + (f" and {len(numbers) - 5} more" if len(numbers) > 5 else "")
