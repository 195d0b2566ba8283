"""Measures free memory, and tells a lack of it from other errors."""

import os
from collections.abc import Generator
from contextlib import contextmanager

import torch

from pipeline.errors import NO_MEMORY, BadInputError, OutOfMemoryError, in_one_line

VARIABLE = "DASAE_MEMORY"
"""Environment variable with the bytes of memory that a process may take, if it is not alone on its machine."""


@contextmanager
def memory_needed(what: str) -> Generator[None]:
    """Raise OutOfMemoryError, which says what it was needed for, where memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or NO_MEMORY in str(error):
            reason = in_one_line(error)
            raise OutOfMemoryError(f"out of memory {what}: {reason}; free some, then run the same command again") from error
        raise


def free_memory(device: torch.device) -> int:
    """Bytes that are free for tensors on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _available()
    if limit := os.environ.get(VARIABLE):
        try:
            free = min(free, int(limit) - _resident())
        except ValueError:
            raise BadInputError(f"{VARIABLE}={limit!r}: give a number of bytes") from None
    return max(0, free)


def _available() -> int:
    # MemAvailable includes caches that Linux would give up. Other systems have no such file; assume half of all memory.
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _resident() -> int:
    """Bytes that this process has; 0 where the system does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
