"""Shows the progress of long work: as a live bar on a terminal, or as a line every few seconds in a log."""

import sys
import time
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10.0


class Advance(Protocol):
    """Reports `amount` more units of work, and a short remark such as the current loss, shown until the next remark."""

    def __call__(self, amount: int = 1, remark: str = "") -> None:
        """Report progress."""


class Watch(Protocol):
    """Shows progress in another place than the terminal: a context, entered when work begins and left when it ends."""

    def __call__(self, title: str, total: int, unit: str) -> AbstractContextManager[Advance]:
        """Begin."""
        ...


_watch: ContextVar[Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watched_by(watch: Watch) -> Generator[None]:
    """Inside the block, report all progress of this thread to `watch` as well."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)


@contextmanager
def progress(title: str, total: int, unit: str) -> Generator[Advance]:
    """Show progress on stderr while the block runs; yields the function that reports it."""
    console, watch = Console(stderr=True), _watch.get()
    with (
        _live(console, title, total, unit) if console.is_terminal else _lines(title, total, unit) as show,
        watch(title, total, unit) if watch else nullcontext() as tell,
    ):
        left = total

        def advance(amount: int = 1, remark: str = "") -> None:
            nonlocal left
            amount = min(amount, left)  # the last document may hold more than was asked for
            left -= amount
            show(amount, remark)
            if tell:
                tell(amount, remark)

        yield advance


@contextmanager
def _live(console: Console, title: str, total: int, unit: str) -> Generator[Advance]:
    columns = (
        TextColumn("{task.description:<22}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[remark]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, remark="")
        shown = ""

        def advance(amount: int = 1, remark: str = "") -> None:
            nonlocal shown
            shown = remark or shown
            bar.update(task, advance=amount, remark=shown)

        yield advance


@contextmanager
def _lines(title: str, total: int, unit: str) -> Generator[Advance]:
    started = last = time.monotonic()
    done = 0
    last_remark = ""

    def show() -> None:
        elapsed = time.monotonic() - started
        eta = f"{elapsed / done * (total - done):.0f} s left" if done else "starting"
        line = f"{title}: {done:,} of {total:,} {unit}, {elapsed:.0f} s, {eta}"
        print(f"{line}, {last_remark}" if last_remark else line, file=sys.stderr, flush=True)

    def advance(amount: int = 1, remark: str = "") -> None:
        nonlocal done, last, last_remark
        done += amount
        last_remark = remark or last_remark
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            show()

    yield advance
    elapsed = time.monotonic() - started
    if elapsed >= 1:
        print(f"{title}: {done:,} {unit} in {elapsed:.1f} s", file=sys.stderr, flush=True)
