"""How much memory is free."""

import os

import torch


def free_memory(device: torch.device) -> int:
    """Bytes of memory that a device's tensors could still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    # Linux knows how much of its cache it would give up; elsewhere half of all there is has to do.
    try:
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
