"""Receives requests to stop: SIGTERM, which schedulers send before they kill, Ctrl-C, or an event that the caller sets.

A stage that is asked to stop saves the work in hand, then raises InterruptedRunError.
"""

import os
import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType

from pipeline.errors import InterruptedRunError

SAVING = b"\nsaving the work in hand; press Ctrl-C again to end at once\n"

_request: ContextVar[threading.Event | None] = ContextVar("request", default=None)


def stop_requested() -> threading.Event:
    """The event of the `stop_on_signal` or `stop_when` around the caller, or one that is never set."""
    return _request.get() or threading.Event()


@contextmanager
def stop_on_signal() -> Generator[threading.Event]:
    """Inside the block, SIGTERM or Ctrl-C sets the yielded event instead of ending the process. A second Ctrl-C ends it.

    An InterruptedRunError that leaves the block gets the exit code that shells have for the signal. Only the main thread can
    receive signals. In other threads, the event is that of `stop_when`, or one that is never set.
    """
    if threading.current_thread() is not threading.main_thread():
        yield stop_requested()
        return
    stop, received = threading.Event(), list[int]()

    def request(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        stop.set()
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.write(2, SAVING)  # print could meet a print that the signal interrupted

    # A shell lets programs in the background ignore Ctrl-C, and so does nohup.
    handled = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, request) for number in handled}
    try:
        with stop_when(stop):
            yield stop
    except InterruptedRunError as error:
        if received:
            error.exit_code = 128 + received[0]
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def stop_when(request: threading.Event) -> Generator[None]:
    """Inside the block, setting `request` asks this thread to stop. For worker threads, which get no SIGTERM."""
    token = _request.set(request)
    try:
        yield
    finally:
        _request.reset(token)
