"""What has to be done about other people's packages: before they can be imported, and to keep them quiet."""

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


def avoid_broken_torchvision() -> None:
    """Hide a torchvision that cannot be imported, as a CUDA build beside a CPU torch cannot.

    sae-bench's dependencies install it, nothing here uses it, and transformers imports it if it seems to be there: then no
    model class at all can be imported. Call this before the first import of a model class. A working one is left alone.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except (RuntimeError, OSError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # pyright: ignore[reportArgumentType]  # the import system's word for "not there"
        # transformers looked, and remembers, if it was imported before this.
        remembered = sys.modules.get("transformers.utils.import_utils")
        for name in ("is_torchvision_available", "is_torchvision_v2_available"):
            if remembered:
                getattr(remembered, name).cache_clear()


@contextmanager
def importing_sae_bench() -> Iterator[None]:
    """Wrap the imports of sae-bench in this.

    Its annotations are checked at run time by jaxtyping and beartype, and beartype >= 0.18, without which Prefect does not
    install, refuses sae-bench's own calls (`select_top_k=...` gives one name two sizes). The check has to be off before the
    functions are defined. Its pydantic models use a form of validator that pydantic has deprecated.
    """
    avoid_broken_torchvision()
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


def keep_freed_memory() -> None:
    """Tell glibc to keep the memory that is freed for the next tensor, instead of giving it back to the kernel.

    A forward pass allocates and frees tensors of tens of megabytes all the time. By default each one is mapped anew and its
    pages are cleared by the kernel, a quarter of the CPU time of a small model (1.24 to 1.31 times slower, measured). The
    process stays at its peak size. Elsewhere than on glibc nothing happens.
    """
    import ctypes
    import platform

    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # names and numbers of <malloc.h>
    libc.mallopt(mmap_threshold, 2**30)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(top_pad, 2**28)


@contextmanager
def quiet_hub() -> Iterator[None]:
    """Hold back the Hub client's log of its retries: what follows them is an error that says it in one line."""
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
