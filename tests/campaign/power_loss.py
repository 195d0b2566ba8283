"""A power failure: what was written since the last fsync is gone, and so are names whose folder was not synced."""

import os
import shutil
from pathlib import Path

from campaign.injector import READ, WRITE, Action, Injector, Operation, kill


class PowerLoss(Injector):
    """Like Injector; before the process dies, files and folders go back to what a disk would have after a power failure.

    `keeps_names`: names are on disk and the unsynced content is not, as file systems do that journal only metadata.
    Otherwise names that were not synced are gone too.
    """

    def __init__(self, root: Path, at: int, *, keeps_names: bool, log: Path):
        super().__init__(root, (WRITE,), at, self._fail, log=log)
        self.keeps_names = keeps_names
        self.unsynced: dict[str, bytes | None] = {}
        """Files written since their last fsync, and what they held then."""
        self.moves: list[tuple[str, Action]] = []
        """Folder of each name made or replaced since it was last synced, and how to undo it."""

    def passed(self, group: str, operation: Operation) -> None:
        if group not in (WRITE, READ):
            return
        path, folder = operation.path, os.path.dirname(operation.path)  # noqa: PTH120
        match operation.name:
            case "open-w":
                self.unsynced.setdefault(path, _content(path))
            case "fsync" | "fdatasync":
                self.unsynced.pop(path, None)
                self.moves = [move for move in self.moves if move[0] != path]
            case "replace" | "rename" | "link":
                before = _content(path)
                self.moves.append((folder, lambda _: _restore(path, before)))
                if operation.source in self.unsynced:
                    self.unsynced[path] = b""
            case "mkdir":
                self.moves.append((folder, lambda _: shutil.rmtree(path, ignore_errors=True)))

    def _fail(self, operation: Operation) -> None:
        self.groups = ()
        for path, content in self.unsynced.items():
            if Path(path).is_file():
                _restore(path, content if content is not None or not self.keeps_names else b"")
        for _, undo in () if self.keeps_names else reversed(self.moves):
            undo(operation)
        kill(operation)


def _content(path: str) -> bytes | None:
    file = Path(path)
    return file.read_bytes() if file.is_file() else None


def _restore(path: str, content: bytes | None) -> None:
    if content is None:
        Path(path).unlink(missing_ok=True)
    elif Path(path).parent.is_dir():
        Path(path).write_bytes(content)
