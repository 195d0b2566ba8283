"""Says in one line what the system said about a path."""

import errno
import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from pipeline.errors import NO_MEMORY, PipelineError, StorageError

LASTING = {
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY),
    *(errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL, errno.ENXIO),
}
"""What a retry does not overcome."""


@contextmanager
def explained(path: Path | str, participle: Literal["read", "written", "deleted"] = "written") -> Generator[None]:
    """Turn the system's error into one line: what cannot be read, written or deleted, and why.

    Raises StorageError for what may pass, such as a full disk, and PipelineError for what stays. An I/O error that
    safetensors reports and a lack of memory are among them. Absence is not: FileNotFoundError passes when reading, and
    errors raised on purpose always pass.
    """
    try:
        yield
    except PipelineError:
        raise
    except Exception as error:
        number = _errno(error)
        if number is None or (participle == "read" and isinstance(error, FileNotFoundError)):
            raise
        raise (PipelineError if number in LASTING else StorageError)(
            f"{path} cannot be {participle}: {os.strerror(number)}; solve that, then run the same command again"
        ) from error


def trouble(error: Exception) -> str | None:
    """What the system said, and about which file where the error names one; None for an error of another kind."""
    number = _errno(error)
    if number is None:
        return None
    name = getattr(error, "filename", None)
    return f"{name}: {os.strerror(number)}" if name else os.strerror(number)


def _errno(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    if isinstance(error, MemoryError) or NO_MEMORY in str(error):
        return errno.ENOMEM
    # safetensors tells I/O errors from damaged files by their text only. It is not imported here, because it is slow.
    if type(error).__name__ == "SafetensorError" and (code := re.search(r"\(os error (\d+)\)", str(error))):
        return int(code[1])
    return None
