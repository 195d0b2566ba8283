"""Receives requests to stop: SIGTERM, which schedulers send before they kill, or an event that the caller sets.

A stage that is asked to stop saves the work in hand, then raises InterruptedRunError.
"""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType

_request: ContextVar[threading.Event | None] = ContextVar("request", default=None)


def stop_requested() -> threading.Event:
    """The caller's stop event (`stop_when`), or an event that is never set. For stages that SIGTERM may simply kill."""
    return _request.get() or threading.Event()


@contextmanager
def stop_on_sigterm() -> Generator[threading.Event]:
    """Inside the block, SIGTERM sets the yielded event instead of ending the process.

    Only the main thread can receive signals. In other threads, the event is that of `stop_when`, or one that is never set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield stop_requested()
        return
    stop = threading.Event()

    def request(_signal: int, _frame: FrameType | None) -> None:
        stop.set()

    previous = signal.signal(signal.SIGTERM, request)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def stop_when(request: threading.Event) -> Generator[None]:
    """Inside the block, setting `request` asks this thread to stop. For worker threads, which get no SIGTERM."""
    token = _request.set(request)
    try:
        yield
    finally:
        _request.reset(token)
