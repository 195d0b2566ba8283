"""SIGTERM as a request: finish the piece of work in hand, commit it, stop. What schedulers send before they kill."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_on_sigterm() -> Iterator[threading.Event]:
    """While the block runs, SIGTERM sets the event it yields instead of ending the process.

    Only a process's main thread can listen to signals; in another one the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        yield stop
    finally:
        signal.signal(signal.SIGTERM, previous)
