"""A request to stop: finish the work in hand, commit it, stop. SIGTERM, which schedulers send before they kill, is one."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_request: ContextVar[threading.Event | None] = ContextVar("request", default=None)


def stop_requested() -> threading.Event:
    """The event of `stop_when`, for work that has nothing to save: there SIGTERM may end the process at once."""
    return _request.get() or threading.Event()


@contextmanager
def stop_on_sigterm() -> Iterator[threading.Event]:
    """While the block runs, SIGTERM sets the event it yields instead of ending the process.

    Only a process's main thread can listen to signals; in another one the event is that of `stop_when`, or never set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield stop_requested()
        return
    stop = threading.Event()
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def stop_when(request: threading.Event) -> Iterator[None]:
    """Let an event stand for SIGTERM in this thread, which is not the main one: a worker's, that is asked in another way."""
    token = _request.set(request)
    try:
        yield
    finally:
        _request.reset(token)
