"""What every benchmark needs: contestants measured in turn in one run, and the machine they were measured on.

Machines drift: only ratios of things measured in turn can be trusted, and on a busy machine CPU seconds more than the clock.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds."""

    seconds: float
    cpu_seconds: float


def interleaved(contestants: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Run every contestant once per round, in turn (A B A B ...), after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    cpu: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, run in contestants.items():
            clock, processor = time.perf_counter(), time.process_time()
            run()
            if number:
                seconds[name].append(time.perf_counter() - clock)
                cpu[name].append(time.process_time() - processor)
    return {name: Timing(statistics.median(seconds[name]), statistics.median(cpu[name])) for name in contestants}


def peak_memory() -> int:
    """Bytes of the largest resident size since `reset_peak_memory`, from Linux's /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def reset_peak_memory() -> None:
    """Start `peak_memory` anew at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def show(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table, and under it the machine and versions."""
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    console = Console(width=120)
    console.print(table)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "zarr", "numcodecs", "numpy"))
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    console.print(f"{machine}; Python {platform.python_version()}, {versions}")
