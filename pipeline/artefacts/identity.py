"""Names from content: the canonical JSON of what determines an artefact's bytes, and its hash."""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.artefacts.storage import LocalStorage, cache_folder
from pipeline.errors import PipelineError

KEY_LENGTH = 12
LARGE = 2**26
"""Bytes from which on a file's hash is worth remembering."""
SETTLED = 2.0
"""Seconds after which a second change of a file surely gets another time than the first."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys, no spaces and no NaN: equal values give equal text.

    Raises ValueError for NaN or infinity, TypeError for what JSON cannot hold.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def key_of(inputs: Mapping[str, Any]) -> str:
    """The 12 hexadecimal digits that name whatever `inputs` fully determines."""
    return sha256(canonical_json(inputs).encode())[:KEY_LENGTH]


def sha256(content: bytes) -> str:
    """SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(files: Iterable[tuple[str, Path]]) -> str:
    """One SHA-256 over (name, content) of several files; the order they come in does not matter."""
    digest = hashlib.sha256()
    for name, path in sorted(files):
        digest.update(f"{name}\0{_known_sha256(path)}\n".encode())
    return digest.hexdigest()


def _known_sha256(path: Path) -> str:
    """`sha256_file`, remembered for large files: every command asks for them, and a corpus of 100 GB takes minutes.

    What is remembered counts as long as the file's place, size and times are the same. The time of the last change of its
    inode is among them, which no program can set.
    """
    before = _traits(path)
    if before["bytes"] < LARGE:
        return sha256_file(path)
    notes, name = LocalStorage(cache_folder() / "hashes"), key_of(before)
    with suppress(OSError):
        return notes.read(name).decode()
    digest = sha256_file(path)
    settled = time.time() - before["changed"] / 1e9 > SETTLED
    if settled and _traits(path) == before:
        with suppress(PipelineError):  # a cache that cannot be written is no reason to stop
            notes.write(name, digest.encode())
    return digest


def _traits(path: Path) -> dict[str, Any]:
    found = path.stat()
    times = {"modified": found.st_mtime_ns, "changed": found.st_ctime_ns}
    return {"path": str(path.resolve()), "inode": found.st_ino, "bytes": found.st_size, **times}
