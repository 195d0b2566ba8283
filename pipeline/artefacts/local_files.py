"""Opens, sweeps and removes files of a folder, and refuses what would reach outside it or never end."""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from pipeline.artefacts.system_errors import explained
from pipeline.errors import BadInputError, CorruptArtefactError, PipelineError

NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
"""What a file system without `flock` answers."""
NO_LINKS = {errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK}
"""What a file system without hard links answers."""


def fsync(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_dangling(path: Path) -> None:
    """Raise BadInputError if the path does not exist because it, or a folder above it, is a link to nothing."""
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            raise BadInputError(f"{place} is a link to {place.readlink()}, which does not exist; restore that or remove it")


def refuse_outside(path: Path, within: Path) -> None:
    """Raise BadInputError if writing or deleting `path` would change something outside the folder `within`.

    `path` itself may be a link, since writing and deleting replace the link. Its folder may not be reached by one that
    leaves `within`.
    """
    with explained(path):
        folder, limit = os.path.realpath(path.parent), os.path.realpath(within)
    if os.path.commonpath([folder, limit]) != limit:
        raise BadInputError(
            f"{path} is reached through a link to {folder}, outside {within}: it is read, but never written or deleted; "
            f"remove the link, or work there"
        )


def remove_tree(folder: Path, within: Path) -> None:
    """Remove a folder with all its content, if it exists. A link is refused, and links inside are removed, not followed."""
    refuse_outside(folder / "x", within)
    with explained(folder, "deleted"), suppress(FileNotFoundError):
        shutil.rmtree(folder)


@contextmanager
def opened(path: Path) -> Generator[tuple[int, int]]:
    """Descriptor and bytes of a regular file, to read. A pipe, socket or device is refused without waiting for it.

    Raises FileNotFoundError, also where a part of the path is a file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        refuse_dangling(path)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path)) from error
    except OSError as error:
        if error.errno == errno.ENXIO:  # a socket
            raise _irregular(path) from error
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise _irregular(path)
        yield descriptor, found.st_size
    finally:
        os.close(descriptor)


def _irregular(path: Path) -> PipelineError:
    return CorruptArtefactError(f"{path} is not a regular file; move it away and run the same command again")


@contextmanager
def temporary(final: Path, content: bytes | memoryview, *, durable: bool = True) -> Generator[Path]:
    """A temporary file beside `final` with this content, synced if `durable`; removed at the end unless it was renamed.

    Its writer holds a lock on it, by which `sweep` knows that the writer lives. File systems without locks are not swept.
    """
    if durable:
        _make_folder(final.parent)
    else:
        final.parent.mkdir(parents=True, exist_ok=True)
    descriptor, path = _owned(final)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            if durable:
                os.fsync(file.fileno())
            yield path
    finally:
        path.unlink(missing_ok=True)


def _owned(final: Path) -> tuple[int, Path]:
    """A new temporary file with a lock on it."""
    while True:
        path = final.with_name(f".{final.name}.{uuid4().hex}.partial")
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return descriptor, path
        os.close(descriptor)  # a sweep took it for a dead writer's before the lock


def is_temporary(name: str) -> bool:
    """True for the name of a file that `temporary` made."""
    last = name.rpartition("/")[2]
    return last.startswith(".") and last.endswith(".partial")


def sweep(folder: Path) -> list[Path]:
    """Remove the temporary files of dead writers below a folder, and return them. Those of live writers stay."""
    swept: list[Path] = []
    with explained(folder, "read"):
        for parent, _, names in os.walk(folder, onerror=_unless_absent):
            paths = [Path(parent, name) for name in names if is_temporary(name)]
            swept += [path for path in paths if _swept(path)]
    return swept


def is_abandoned(path: Path) -> bool:
    """Whether the writer of a temporary file is dead. False where that cannot be told."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _swept(path: Path) -> bool:
    """True if the writer of a temporary file was dead and the file is removed."""
    try:
        with explained(path, "deleted"):
            descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except PipelineError as error:
        if isinstance(error.__cause__, FileNotFoundError):  # its writer finished meanwhile
            return False
        raise
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with explained(path, "deleted"):
            path.unlink(missing_ok=True)
    except OSError:  # its writer lives, or the file system has no locks and cannot tell
        return False
    finally:
        os.close(descriptor)
    return True


def link(source: Path, final: Path) -> bool:
    """Give a file a second name unless that exists, which returns False. Without hard links, renames it under a lock."""
    try:
        os.link(source, final)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        return _rename_unless_there(source, final)
    return True


def share(source: Path, final: Path) -> bool:
    """Give a file a second name, replacing what has it. False where the file system cannot, and the file must be copied."""
    _make_folder(final.parent)
    while True:
        try:
            os.link(source.resolve(), final)
        except FileExistsError:
            final.unlink(missing_ok=True)
        except OSError as error:
            if error.errno not in (*NO_LINKS, errno.EXDEV):
                raise
            return False
        else:
            return True


def _rename_unless_there(source: Path, final: Path) -> bool:
    """As exclusive as the file system's locks reach: all processes of one machine at least."""
    descriptor = os.open(final.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.path.lexists(final):
            return False
        source.rename(final)
    finally:
        os.close(descriptor)
    return True


def _make_folder(folder: Path) -> None:
    """Like mkdir with parents, but durable: new folders survive a power failure."""
    if not folder.is_dir():
        _make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        fsync(folder.parent)
