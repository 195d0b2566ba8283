"""Limits torch to one thread."""

import os
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Generator[None]:
    """Inside the block, every torch operation runs in one thread, so that its sums do not depend on the number of cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def single_threads() -> ThreadPoolExecutor:
    """A thread for each core. Call it inside `one_thread`: torch has no threads of its own in them.

    A new thread takes over torch's setting only at its first operation that could use threads. A matrix product before that
    would have MKL's default, and where MKL splits a sum depends on the number of threads.
    """
    return ThreadPoolExecutor(os.cpu_count(), initializer=torch.set_num_threads, initargs=(1,))
