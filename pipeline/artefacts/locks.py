"""Locks between processes: files that the kernel unlocks when their holder dies, removed by whoever releases them."""

import errno
import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.artefacts.local_files import NO_LOCKS, refuse_outside
from pipeline.artefacts.system_errors import explained
from pipeline.errors import BadInputError


class Locks:
    """The locks of a workspace, each by its name, as files in one folder inside `within`.

    What a lock protects may have parts that several processes make together: each claims the parts that it makes.
    """

    def __init__(self, folder: Path, within: Path):
        self.folder, self.within = folder, within

    @contextmanager
    def held(self, name: str) -> Generator[None]:
        """Hold a lock, after waiting for whoever holds it."""
        with self._waited(name, fcntl.LOCK_EX):
            yield

    @contextmanager
    def attempted(self, name: str) -> Generator[bool]:
        """Hold a lock, or yield False when another process holds it."""
        descriptor = self._acquired(name, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            yield descriptor is not None
        finally:
            if descriptor is not None:
                self._release(name, descriptor)

    @contextmanager
    def claimed(self, name: str, part: str) -> Generator[bool]:
        """Hold one part of what a lock protects, or yield False when another process has it. Waits while one is `alone`."""
        with self._waited(f"{name}.parts", fcntl.LOCK_SH), self.attempted(f"{name}.part-{part}") as claimed:
            yield claimed

    @contextmanager
    def alone(self, name: str) -> Generator[bool]:
        """Hold all parts of what a lock protects, or yield False when another process has one."""
        with self.attempted(f"{name}.parts") as alone:
            yield alone

    def assure(self, name: str, part: str | None = None) -> None:
        """Nothing to do: the kernel takes no lock from a living process."""

    @contextmanager
    def _waited(self, name: str, operation: int) -> Generator[None]:
        descriptor = self._acquired(name, operation)
        assert descriptor is not None
        try:
            yield
        finally:
            self._release(name, descriptor)

    def _acquired(self, name: str, operation: int) -> int | None:
        path = self.folder / name
        while True:
            descriptor = self._open(path)
            try:
                fcntl.flock(descriptor, operation)
                if _is_at(descriptor, path):
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                return None
            except OSError as error:
                os.close(descriptor)
                if error.errno in NO_LOCKS:
                    raise BadInputError(
                        f"{self.within}: this file system has no locks (flock), which keep two processes apart; mount it "
                        f"with them (Lustre: -o flock), or use a workspace on another one"
                    ) from None
                raise
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)  # its last holder removed the file; the next one has another

    def _open(self, path: Path) -> int:
        """A descriptor of a lock's file, which is made if it is not there. Links are not followed."""
        refuse_outside(path, self.within)
        flags = os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        with explained(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                return os.open(path, flags | os.O_RDWR, 0o666)
            except PermissionError:  # another user's file, which can be locked all the same
                return os.open(path, flags | os.O_RDONLY, 0o666)
            except OSError as error:
                if error.errno == errno.ELOOP:
                    raise BadInputError(f"{path} is a link, and locks are files; delete it") from None
                raise

    def _release(self, name: str, descriptor: int) -> None:
        with suppress(OSError):  # a shared lock that others still hold, or another user's file
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, self.folder / name):
                (self.folder / name).unlink()
        os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one at that path."""
    try:
        there = path.lstat()
    except FileNotFoundError:
        return False
    mine = os.fstat(descriptor)
    return (mine.st_dev, mine.st_ino) == (there.st_dev, there.st_ino)
