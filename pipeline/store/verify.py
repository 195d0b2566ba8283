"""Finds damaged files of a store, and sums up the activation norms that its commits record."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import google_crc32c
from pydantic import ValidationError

from pipeline.artefacts.identity import sha256
from pipeline.artefacts.manifest import MANIFEST, FileRecord, read_manifest
from pipeline.artefacts.storage import Storage
from pipeline.errors import CorruptArtefactError
from pipeline.runtime.progress import progress
from pipeline.store import format as fmt
from pipeline.store.writer import Commit, commit_name


@dataclass(frozen=True)
class Damage:
    """A file of a store that is missing or changed."""

    file: str
    what: str
    shard: int | None = None
    """The shard that the file belongs to; None for the manifest, the metadata and the tokens."""

    def __str__(self) -> str:
        return f"{self.file} {self.what}"


@dataclass(frozen=True, kw_only=True)
class StoreNorms:
    """Norms ||x|| of the activations of one layer in a whole store."""

    rms: float
    """Root mean square."""
    median: float
    """Median of the shards' medians."""
    max: float
    massive: int
    """Activations with more than `writer.MASSIVE` times their shard's median."""


def recorded_files(storage: Storage) -> dict[str, FileRecord]:
    """The files that a finished store's manifest lists: all but the shards' data. {} for an unfinished store.

    Raises CorruptArtefactError for a manifest that cannot be read.
    """
    manifest = read_manifest(storage, fmt.REMEDY)
    return manifest.files if manifest else {}


def damages(storage: Storage, *, deep: bool) -> list[Damage]:
    """Files that are missing, have another size or cannot be read; with `deep`, also files with another checksum.

    A shard without a commit record is damage only in a finished store, which has a manifest.
    """
    committed = storage.sizes(fmt.COMMITS)
    sizes = storage.sizes()  # listed second, so that it includes the files of a shard that is committed in between
    found: dict[str, Damage] = {}
    everything = chain(
        _unlike_manifest(storage, sizes, deep), _in_layout(storage, sizes, deep), _in_shards(storage, committed, sizes, deep)
    )
    for damage in everything:
        found.setdefault(damage.file, damage)
    return list(found.values())


def _unlike_manifest(storage: Storage, sizes: dict[str, int], deep: bool) -> Iterator[Damage]:
    """Files that differ from their record in the manifest."""
    try:
        files = recorded_files(storage)
    except CorruptArtefactError:
        yield Damage(MANIFEST, "cannot be read")
        return
    for name, record in files.items():
        shard = re.fullmatch(rf"{fmt.COMMITS}/(\d+)\.json", name)
        what = _size_damage(name, record.bytes, sizes)
        if not what and deep and sha256(storage.read(name)) != record.sha256:
            what = "does not match its checksum"
        if what:
            yield Damage(name, what, int(shard[1]) if shard else None)


def _in_layout(storage: Storage, sizes: dict[str, int], deep: bool) -> Iterator[Damage]:
    """Damage to what `format.create` wrote: metadata, tokens, documents."""
    try:
        layout = fmt.read_layout(storage)
    except CorruptArtefactError:
        yield Damage(fmt.ROOT, "is missing or cannot be read")
        return
    # The manifest already has checksums of this metadata; only the token arrays need reading.
    for name, content in fmt.skeleton(layout)[1].items() if MANIFEST not in sizes else ():
        if name not in sizes or storage.read(name) != content.to_bytes():
            yield Damage(name, "is not as it was written")
    for name in fmt.text_arrays(layout) if deep else ():
        try:
            fmt.read_whole(storage, name)
        except CorruptArtefactError:
            yield Damage(name, "cannot be read")


def _in_shards(storage: Storage, committed: dict[str, int], sizes: dict[str, int], deep: bool) -> Iterator[Damage]:
    """Files of committed shards that differ from their record in the commit."""
    try:
        layout = fmt.read_layout(storage)
    except CorruptArtefactError:
        return
    shards = [shard for shard in range(layout.shards) if commit_name(shard) in committed]
    total = sum(sizes.get(file, 0) for shard in shards for file in fmt.shard_files(layout, shard))
    with progress("verify", total if deep else len(shards), "bytes" if deep else "shards") as advance:
        for shard in shards:
            try:
                commit = Commit.model_validate_json(storage.read(commit_name(shard)))
            except ValidationError:
                yield Damage(commit_name(shard), "cannot be read", shard)
                continue
            for file, check in commit.files.items():
                what = _size_damage(file, check.bytes, sizes)
                if not what and deep and google_crc32c.value(storage.read(file)) != check.crc32c:
                    what = "does not match its checksum"
                if what:
                    yield Damage(file, what, shard)
                advance(sizes.get(file, 0) if deep else 0)
            advance(0 if deep else 1)


def _size_damage(file: str, known: int, sizes: dict[str, int]) -> str:
    if file not in sizes:
        return "is missing"
    return "" if sizes[file] == known else f"has {sizes[file]} bytes instead of {known}"


def store_norms(commits: dict[int, Commit], layer: int) -> StoreNorms:
    """The norms of a layer over all committed shards."""
    norms = [commit.norms[layer] for commit in commits.values()]
    medians = sorted(shard.median for shard in norms)
    return StoreNorms(
        rms=math.sqrt(math.fsum(shard.sum_squares for shard in norms) / sum(commit.rows for commit in commits.values())),
        median=medians[len(medians) // 2],
        max=max(shard.max for shard in norms),
        massive=sum(shard.massive for shard in norms),
    )
