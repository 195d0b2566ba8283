"""Whether a store is what it was when it was committed, and what there is to say about it."""

import math
from dataclasses import dataclass

import google_crc32c
from pydantic import ValidationError

from pipeline.progress import progress
from pipeline.storage import Storage
from pipeline.store import format as fmt
from pipeline.store.writer import Commit, LayerNorms, commit_name


@dataclass(frozen=True)
class Damage:
    """One file of a store that is not as it was committed."""

    shard: int
    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file} {self.what}"


def damages(storage: Storage, *, deep: bool) -> list[Damage]:
    """Files of committed shards that are missing or have another size; with `deep`, also those with another checksum.

    A record that cannot be read counts as damage of its shard. Shards without a record are not damaged but missing.
    """
    _, layout = fmt.open_group(storage)
    sizes = storage.sizes()
    found: list[Damage] = []
    committed = [shard for shard in range(layout.shards) if commit_name(shard) in sizes]
    total = sum(sizes[file] for shard in committed for file in fmt.shard_files(layout, shard) if file in sizes)
    with progress("verify", total if deep else len(sizes), "bytes" if deep else "files") as advance:
        for shard in committed:
            try:
                commit = Commit.model_validate_json(storage.read(commit_name(shard)))
            except ValidationError:
                found.append(Damage(shard, commit_name(shard), "cannot be read"))
                continue
            for file, check in commit.files.items():
                if file not in sizes:
                    found.append(Damage(shard, file, "is missing"))
                elif sizes[file] != check.bytes:
                    found.append(Damage(shard, file, f"has {sizes[file]} bytes instead of {check.bytes}"))
                elif deep and google_crc32c.value(storage.read(file)) != check.crc32c:
                    found.append(Damage(shard, file, "does not match its checksum"))
                advance(sizes.get(file, 0) if deep else 1)
    return found


def store_norms(commits: dict[int, Commit], layer: int) -> dict[str, float]:
    """Norms of a layer over the whole store: root mean square, median of the shards' medians, largest, massive rows."""
    norms: list[LayerNorms] = [commit.norms[layer] for commit in commits.values()]
    medians = sorted(shard.median for shard in norms)
    return {
        "rms": math.sqrt(math.fsum(shard.sum_squares for shard in norms) / sum(commit.rows for commit in commits.values())),
        "median": medians[len(medians) // 2],
        "max": max(shard.max for shard in norms),
        "massive": sum(shard.massive for shard in norms),
    }
