"""Finds damaged files of a store. Damage is what was read and is wrong; what cannot be read raises the system's error."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, cast

import torch

from pipeline.artefacts.identity import sha256
from pipeline.artefacts.manifest import MANIFEST, FileRecord, Manifest, read_manifest
from pipeline.artefacts.storage import Storage, read_many
from pipeline.errors import CorruptArtefactError
from pipeline.runtime.progress import progress
from pipeline.store import format as fmt
from pipeline.store.commits import Commit, LayerNorms, commit_name, read_commit
from pipeline.store.direct import ShardedArray, is_committed
from pipeline.store.norms import store_facts
from pipeline.store.text_arrays import REMEDY, read_whole
from pipeline.store.writer import activation_norms, summed

SAME_NORM = 1e-4
"""Relative difference up to which norms are the same: another machine sums a row in another order."""


@dataclass(frozen=True)
class Damage:
    """A file of a store that is missing or changed."""

    file: str
    what: str
    shard: int | None = None
    """The shard that the file belongs to; None for the manifest, the metadata and the tokens."""

    def __str__(self) -> str:
        return f"{self.file} {self.what}"


def recorded_files(storage: Storage) -> dict[str, FileRecord]:
    """The files that a finished store's manifest lists: all but the shards' data. {} for an unfinished store.

    Raises CorruptArtefactError for a manifest that cannot be read or names a file outside the store.
    """
    manifest = _manifest(storage)
    return manifest.files if manifest else {}


def _manifest(storage: Storage) -> Manifest | None:
    manifest = read_manifest(storage, REMEDY)
    for path in map(PurePosixPath, manifest.files if manifest else ()):
        if path.is_absolute() or ".." in path.parts:
            raise CorruptArtefactError(f"{storage}/{MANIFEST} names {path}, which is not in the store; {REMEDY}")
    return manifest


def damages(storage: Storage, *, deep: bool) -> list[Damage]:
    """Files that are missing, have another size or cannot be parsed, and commits, metadata and facts that were changed.

    With `deep`, also data that does not match its checksums, and commits whose norms are not those of their rows. A shard
    without a commit record is damage only in a finished store, which has a manifest.
    """
    committed = storage.sizes(fmt.COMMITS)
    sizes = storage.sizes()  # listed second, so that it includes the files of a shard that is committed in between
    found: dict[str, Damage] = {}
    for damage in _Verification(storage, committed, sizes, deep).damages():
        found.setdefault(damage.file, damage)
    return list(found.values())


def check_text(storage: Storage) -> None:
    """Raise CorruptArtefactError if a file of an unfinished store's tokens is not as it was written."""
    layout, text_files = fmt.read_root(storage)
    for name in () if text_files else fmt.text_arrays(layout):  # stores of earlier versions
        read_whole(storage, name)
    for name, known in text_files.items():
        if storage.size(name) is None or sha256(storage.read(name)) != known:
            raise CorruptArtefactError(f"{storage}/{name} is not as it was written; {REMEDY}")


@dataclass
class _Verification:
    """What the checks of one store share."""

    storage: Storage
    committed: Mapping[str, int]
    sizes: Mapping[str, int]
    deep: bool
    layers: dict[str, ShardedArray] = field(default_factory=dict[str, ShardedArray])
    """With `deep`, the layers' arrays that can be read, by name."""

    def damages(self) -> Iterator[Damage]:
        try:
            manifest = _manifest(self.storage)
        except CorruptArtefactError:
            yield Damage(MANIFEST, "cannot be read")
            manifest = None
        yield from self._unlike_manifest(manifest.files if manifest else {})
        try:
            layout, text_files = fmt.read_root(self.storage)
        except CorruptArtefactError:
            yield Damage(fmt.ROOT, "is missing, damaged or was changed")
            return
        # A manifest already has checksums of what `format.create` wrote.
        yield from self._unlike_created(layout, text_files) if MANIFEST not in self.sizes else ()
        yield from self._in_layout(layout)
        commits: dict[int, Commit] = {}
        yield from self._in_shards(layout, commits)
        if manifest and len(commits) == len(layout.present):
            facts = store_facts(layout, commits)
            if wrong := [name for name in facts if not _agree(manifest.facts.get(name), facts[name])]:
                yield Damage(MANIFEST, f"has other {' and '.join(wrong)} than its commits")

    def _unlike_manifest(self, files: Mapping[str, FileRecord]) -> Iterator[Damage]:
        """Files that differ from their record in the manifest. Commits and metadata are small: they are always compared."""
        for name, record in files.items():
            shard = re.fullmatch(rf"{fmt.COMMITS}/(\d+)\.json", name)
            what = self._size_damage(name, record.bytes)
            small = shard or name.endswith(fmt.ROOT)
            if not what and (self.deep or small) and sha256(self.storage.read(name)) != record.sha256:
                what = "does not match its checksum"
            if what:
                yield Damage(name, what, int(shard[1]) if shard else None)

    def _unlike_created(self, layout: fmt.Layout, text_files: Mapping[str, str]) -> Iterator[Damage]:
        """Files of an unfinished store that are not as `format.create` wrote them."""
        metadata = {name: sha256(content.to_bytes()) for name, content in fmt.skeleton(layout, text_files)[1].items()}
        for name, known in (metadata | dict(text_files)).items():
            if self._size(name) is None or sha256(self.storage.read(name)) != known:
                yield Damage(name, "is not as it was written")

    def _in_layout(self, layout: fmt.Layout) -> Iterator[Damage]:
        """With `deep`, metadata, tokens and documents that cannot be read."""
        for name in fmt.text_arrays(layout) if self.deep else ():
            try:
                read_whole(self.storage, name)
            except CorruptArtefactError:
                yield Damage(name, "cannot be read")
        for name in map(fmt.layer_array, layout.layers) if self.deep else ():
            try:
                array = ShardedArray.open(self.storage, name)
            except CorruptArtefactError:
                yield Damage(f"{name}/{fmt.ROOT}", "cannot be read")
                continue
            if array and not array.fits(layout, layer=True):
                yield Damage(f"{name}/{fmt.ROOT}", "is of another layout than the store")
            elif array:
                self.layers[name] = array

    def _in_shards(self, layout: fmt.Layout, commits: dict[int, Commit]) -> Iterator[Damage]:
        """Commits that cannot be believed, and files that differ from them. Fills `commits` with those that can."""
        shards = [shard for shard in layout.present if commit_name(shard) in self.committed]
        chunks = layout.shard_rows // layout.chunk_rows
        total = sum(self.sizes.get(file, 0) for shard in shards for file in fmt.shard_files(layout, shard))
        records = read_many(self.storage, map(commit_name, shards))
        with progress("verify", total if self.deep else len(shards), "bytes" if self.deep else "shards") as advance:
            for shard, record in zip(shards, records, strict=True):
                try:
                    commits[shard] = read_commit(record, shard, layout)
                except ValueError as error:
                    yield Damage(commit_name(shard), str(error), shard)
                    continue
                for file, check in commits[shard].files.items():
                    what = self._size_damage(file, check.bytes)
                    if not what and self.deep and not is_committed(self.storage.read(file), check, chunks):
                        what = "does not match its checksum"
                    if what:
                        yield Damage(file, what, shard)
                    elif self.deep:
                        yield from self._unlike_rows(layout, file, commits[shard])
                    advance(self.sizes.get(file, 0) if self.deep else 0)
                advance(0 if self.deep else 1)

    def _unlike_rows(self, layout: fmt.Layout, file: str, commit: Commit) -> Iterator[Damage]:
        """A commit with other norms than the rows of one of its layers, whose file has the right checksums."""
        name, start = file.partition("/")[0], layout.shard_range(commit.shard)[0]
        if not (array := self.layers.get(name)):
            return
        bits = fmt.BITS[layout.dtype]
        rows_RD = torch.empty(commit.rows, layout.d_in, dtype=bits.torch_dtype)
        try:
            array.read(start, bits.patterns(rows_RD), commit.files[file])
        except CorruptArtefactError:
            yield Damage(file, "cannot be read", commit.shard)
            return
        norms = {fmt.layer_array(layer): norms for layer, norms in commit.norms.items()}
        if not _same_norms(norms[name], summed(activation_norms(rows_RD))):
            yield Damage(commit_name(commit.shard), f"has other norms than the rows of {name}", commit.shard)

    def _size(self, file: str) -> int | None:
        """Bytes of a file. A listing can be stale, so that only a file that cannot be found either is missing."""
        known = self.sizes.get(file)
        return self.storage.size(file) if known is None else known

    def _size_damage(self, file: str, known: int) -> str:
        size = self._size(file)
        if size is None:
            return "is missing"
        return "" if size == known else f"has {size} bytes instead of {known}"


def _agree(recorded: Any, found: Any) -> bool:
    """Whether a fact of a manifest is what the commits say. Manifests of earlier versions lack some."""
    if isinstance(recorded, dict) and isinstance(found, dict):
        facts = cast("dict[str, Any]", found)
        return all(_agree(value, facts.get(name)) for name, value in cast("dict[str, Any]", recorded).items())
    if isinstance(recorded, int | float) and isinstance(found, int | float):
        return math.isclose(recorded, found, rel_tol=1e-9)
    return recorded is None or recorded == found


def _same_norms(recorded: LayerNorms, found: LayerNorms) -> bool:
    """Whether a commit's norms are those of its rows. Commits of earlier versions lack some."""
    pairs = [(value, getattr(found, name)) for name, value in recorded if value is not None]
    return all(math.isclose(value, other, rel_tol=SAME_NORM) for value, other in pairs)
