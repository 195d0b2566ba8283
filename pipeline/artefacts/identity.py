"""Computes keys and fingerprints: hashes of the canonical JSON of values, and of the content of files."""

import hashlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.artefacts.local_storage import LocalStorage
from pipeline.artefacts.storage import cache_folder
from pipeline.errors import PipelineError

KEY_LENGTH = 12
SEAL = "seal"
"""Entry of a record that holds the hash of all its other entries."""
LARGE = 2**26
"""Bytes from which on a file's hash is cached."""
SETTLED = 2.0
"""Seconds that a file must be unchanged before its hash is cached: two quick changes can get the same time stamp."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces and no NaN. Equal values give equal text.

    Raises ValueError for NaN or infinity, TypeError for a type that JSON does not have.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def key_of(inputs: Mapping[str, Any]) -> str:
    """The first 12 hexadecimal digits of the SHA-256 of the canonical JSON of `inputs`."""
    return sha256(canonical_json(inputs).encode())[:KEY_LENGTH]


def seal_of(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record's canonical JSON, without its own entry `seal`. A record that has another seal was changed."""
    return sha256(canonical_json({name: value for name, value in record.items() if name != SEAL}).encode())


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of JSON values with its seal, to be written to a file and compared by `is_sealed` when it is read."""
    return {**record, SEAL: seal_of(record)}


def is_sealed(record: Mapping[str, Any]) -> bool:
    """True if a record is as it was sealed. Records of earlier versions have no seal and count as sound."""
    return SEAL not in record or record[SEAL] == seal_of(record)


def sha256(content: bytes) -> str:
    """SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    # Opening a pipe for reading would wait for a writer.
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123 - takes a descriptor
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(files: Iterable[tuple[str, Path]]) -> str:
    """One SHA-256 over the names and contents of several files, in any order."""
    digest = hashlib.sha256()
    for name, path in sorted(files):
        digest.update(f"{name}\0{_known_sha256(path)}\n".encode())
    return digest.hexdigest()


def _known_sha256(path: Path) -> str:
    """`sha256_file`, cached for large files: every command needs the hash, and hashing a corpus of 100 GB takes minutes.

    A cached hash is valid while the file's path, inode, size and times are the same. Among them is the time of the inode's
    last change, which no program can set.
    """
    before = _traits(path)
    if before["bytes"] < LARGE:
        return sha256_file(path)
    cache, name = LocalStorage(cache_folder() / "hashes"), key_of(before)
    with suppress(OSError, PipelineError):
        return cache.read(name).decode()
    digest = sha256_file(path)
    settled = time.time() - before["changed"] / 1e9 > SETTLED
    if settled and _traits(path) == before:
        with suppress(PipelineError):  # without the cache the next command is only slower
            cache.write(name, digest.encode())
    return digest


def _traits(path: Path) -> dict[str, Any]:
    found = path.stat()
    times = {"modified": found.st_mtime_ns, "changed": found.st_ctime_ns}
    return {"path": str(path.resolve()), "inode": found.st_ino, "bytes": found.st_size, **times}
