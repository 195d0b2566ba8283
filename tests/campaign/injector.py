"""Counts the file-system operations of this process below a folder, and lets a fault happen at the n-th."""

import builtins
import io
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch

from campaign.workers import OUTPUT

WRITE, READ, LIST, STAT = "write", "read", "list", "stat"
WRITERS = ("unlink", "remove", "mkdir", "rmdir", "truncate", "fsync", "fdatasync", "chmod")
MOVERS = ("replace", "rename", "link", "symlink")
_open = io.open


@dataclass(frozen=True)
class Operation:
    """One operation that is about to happen."""

    name: str
    path: str
    """Absolute; of a move, what it moves to."""
    source: str = ""
    tear: Callable[[], object] | None = None
    """Does half of it."""


Action = Callable[[Operation], object]


def kill(_: Operation) -> None:
    """The process dies before the operation."""
    os.kill(os.getpid(), signal.SIGKILL)


def tear(operation: Operation) -> None:
    """The process dies in the middle of the operation."""
    if operation.tear:
        operation.tear()
    kill(operation)


def fails(number: int) -> Action:
    """The operation fails with this errno."""

    def fail(operation: Operation) -> None:
        raise OSError(number, os.strerror(number), operation.path)

    return fail


def send(number: int) -> Action:
    """The process gets a signal before the operation."""
    return lambda _: os.kill(os.getpid(), number)


class Injector:
    """Call it in the child. `at` is the number of the operation that `action` is for, counted from 1 in `groups`.

    `again` says what follows: "once" nothing, "always" every later operation, "path" every later one of that kind and path.
    """

    def __init__(
        self,
        root: Path,
        groups: tuple[str, ...],
        at: int = 0,
        action: Action = kill,
        *,
        again: str = "once",
        log: Path | None = None,
    ):
        self.root, self.groups, self.at, self.action, self.again, self.log = str(root), groups, at, action, again, log
        self.count, self.hit = 0, Operation("", "")
        self.lock = threading.RLock()

    def __call__(self) -> None:
        for name in WRITERS:
            self._wrap(name, WRITE)
        for name in MOVERS:
            self._wrap_move(name)
        for name in ("scandir", "listdir"):
            self._wrap(name, LIST)
        for name in ("stat", "lstat"):
            self._wrap(name, STAT)
        self._wrap("preadv", READ)
        self._wrap_os_open()
        self._wrap_save()
        builtins.open = io.open = self._opened

    def seen(self, group: str, operation: Operation) -> None:
        """An operation is about to happen."""
        inside = operation.path == self.root or operation.path.startswith(self.root + os.sep)
        if not inside or OUTPUT in operation.path:
            return
        with self.lock:
            if group in self.groups:
                self.count += 1
                if self.log and not self.at:
                    with _open(self.log, "a") as log:
                        log.write(f"{operation.name}\n")
                if self._is_hit(operation):
                    if self.log:
                        _open(self.log, "w").write(f"{operation.name} {operation.path.removeprefix(self.root)}")
                    self.action(operation)
            self.passed(group, operation)

    def passed(self, group: str, operation: Operation) -> None:
        """An operation goes on undisturbed. For subclasses."""

    def _is_hit(self, operation: Operation) -> bool:
        if self.count == self.at:
            self.hit = operation
            return True
        same = (operation.name, operation.path) == (self.hit.name, self.hit.path)
        return bool(self.at) and self.count > self.at and (self.again == "always" or (self.again == "path" and same))

    def _wrap(self, name: str, group: str) -> None:
        real = getattr(os, name)

        def wrapped(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            self.seen(group, Operation(name, _absolute(path, kwargs.get("dir_fd"))))
            return real(path, *args, **kwargs)

        setattr(os, name, wrapped)

    def _wrap_move(self, name: str) -> None:
        real = getattr(os, name)

        def wrapped(source: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
            self.seen(WRITE, Operation(name, _absolute(target), _absolute(source)))
            return real(source, target, *args, **kwargs)

        setattr(os, name, wrapped)

    def _wrap_os_open(self) -> None:
        real = os.open

        def wrapped(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
            changes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            name = "open-w" if changes else "open"
            self.seen(WRITE if changes else READ, Operation(name, _absolute(path, kwargs.get("dir_fd"))))
            return real(path, flags, *args, **kwargs)

        os.open = wrapped

    def _wrap_save(self) -> None:
        real = safetensors.torch.serialize_file

        def wrapped(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> None:
            def half() -> None:
                real(tensors, filename, *args, **kwargs)
                os.truncate(filename, os.path.getsize(filename) // 2)  # noqa: PTH202

            try:
                self.seen(WRITE, Operation("open-w", _absolute(filename), tear=half))
            except OSError as error:  # as the library says it
                text = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                raise safetensors.SafetensorError(text) from None
            real(tensors, filename, *args, **kwargs)

        safetensors.torch.serialize_file = wrapped

    def _opened(self, file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        path = _absolute(file)
        if not set(mode) & set("wax+"):
            self.seen(READ, Operation("open", path))
            return _open(file, mode, *args, **kwargs)
        self.seen(WRITE, Operation("open-w", path))
        return _Written(_open(file, mode, *args, **kwargs), self, path)


class _Written:
    """A file open for writing whose writes are operations."""

    def __init__(self, file: Any, injector: Injector, path: str):
        self.__dict__.update(file=file, injector=injector, path=path)

    def write(self, data: Any) -> int:
        def half() -> None:
            self.file.write(data[: len(data) // 2])
            self.file.flush()

        self.injector.seen(WRITE, Operation("write", self.path, tear=half))
        return self.file.write(data)

    def __enter__(self) -> "_Written":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __iter__(self) -> Any:
        return iter(self.file)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _absolute(path: Any, folder: int | None = None) -> str:
    if isinstance(path, int):
        return str(Path(f"/proc/self/fd/{path}").readlink())
    name = os.fsdecode(path)
    return os.path.abspath(name if folder is None else f"{_absolute(folder)}/{name}")  # noqa: PTH100
