"""The training log of one SAE: a JSON line per record, appended while it trains and cut back when it resumes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.artefacts.identity import sha256
from pipeline.artefacts.storage import explained, fsync, write_atomically


class Log:
    """A log open for appending. Each line is written at once, and an error names the file."""

    def __init__(self, path: Path, content: bytes):
        """Replace the file, whatever it holds, by one with this content; a link is replaced, not followed."""
        write_atomically(path, content)
        self.path = path
        with explained(path):
            self._file = path.open("ab", buffering=0)  # a buffer would raise the error again when it is closed

    def write(self, line: str) -> None:
        """Append a line. Raises StorageError when the disk does not take it; part of the line may then be there."""
        rest = line.encode()
        with explained(self.path):
            while rest:
                rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def mark(log: Path) -> dict[str, Any]:
    """Bytes and hash of a log as it is now, on the disk. A log that does not exist is empty."""
    if not log.is_file():
        return {"bytes": 0, "sha256": sha256(b"")}
    with explained(log):
        fsync(log)  # otherwise a power cut could leave a log that ends before its checkpoint
    content = log.read_bytes()
    return {"bytes": len(content), "sha256": sha256(content)}


def until(log: Path, marked: Mapping[str, Any]) -> bytes | None:
    """The beginning of a log that `mark` described; None if it is not as it was then."""
    content = log.read_bytes()[: marked["bytes"]] if log.is_file() else b""
    return content if sha256(content) == marked["sha256"] else None
