"""Works around faults of other packages: broken imports, checks that fail, needless logs, slow memory."""

import errno
import importlib
import os
import stat
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, cast


def avoid_broken_torchvision() -> None:
    """Hide a torchvision that cannot be imported, such as a CUDA build beside a CPU torch; leave a working one alone.

    sae-bench's dependencies install torchvision. Nothing here uses it, but transformers imports it where it is installed,
    and then no model class can be imported. Call this before the first import of a model class.
    """
    try:
        importlib.import_module("torchvision")
    except ImportError:
        return
    except (RuntimeError, OSError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # pyright: ignore[reportArgumentType]  # None marks a module as missing
        # If transformers was imported before, it has cached that torchvision exists.
        remembered = sys.modules.get("transformers.utils.import_utils")
        for name in ("is_torchvision_available", "is_torchvision_v2_available"):
            if remembered:
                getattr(remembered, name).cache_clear()


@contextmanager
def importing_sae_bench() -> Generator[None]:
    """Wrap every import of sae-bench in this: it switches off checks that sae-bench itself fails.

    jaxtyping and beartype check sae-bench's annotations at run time. beartype >= 0.18, which Prefect needs, rejects
    sae-bench's own calls (`select_top_k=...` gives one name two sizes), so the check must be off before its functions are
    defined. Its pydantic models use a deprecated form of validator, whose warnings are silenced.
    """
    avoid_broken_torchvision()
    import jaxtyping

    jaxtyping.config.update("jaxtyping_disable", True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@contextmanager
def replaced(*patches: tuple[Any, str, Any]) -> Generator[None]:
    """While this lasts, attributes of other libraries have other values: (module or class, name, value)."""
    with ExitStack() as undo:
        for owner, name, value in patches:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)
        yield


@contextmanager
def quiet_sae_bench() -> Generator[None]:
    """Silence what sae-bench prints, its progress bars, and its warnings; if it fails, an error says so in one line."""
    from tqdm.std import tqdm

    before = cast("Any", tqdm).__init__

    def disabled(self: Any, *arguments: Any, **options: Any) -> None:
        before(self, *arguments, **options | {"disable": True})

    with replaced((tqdm, "__init__", disabled)), warnings.catch_warnings(action="ignore"), redirect_stdout(StringIO()):
        yield


@contextmanager
def data_sets_in(local: Callable[[str], Path | None]) -> Generator[None]:
    """While this lasts, sae-bench takes a data set from the folder that `local` finds for its name, else from the Hub.

    By itself it looks into the working directory, which all threads of a process share.
    """
    from sae_bench.evals.scr_and_tpp import dataset_creation
    from sae_bench.sae_bench_utils import dataset_utils

    before = cast("Any", dataset_utils).load_dataset

    def load(name: str, *arguments: Any, **options: Any) -> Any:
        return before(str(local(name) or name), *arguments, **options)

    with replaced((dataset_creation, "load_dataset", load), (dataset_utils, "load_dataset", load)):
        yield


@contextmanager
def files_of_commit(module: Any, revision: str) -> Generator[None]:
    """While this lasts, a module of SAELens fetches files of this commit. Else it takes those of a branch."""
    before = module.hf_hub_download

    def fetch(*arguments: Any, **options: Any) -> Any:
        return before(*arguments, **options | {"revision": revision})

    with replaced((module, "hf_hub_download", fetch)):
        yield


@contextmanager
def errors_are_not_absence() -> Generator[None]:
    """While this lasts, `os.path.isfile` and its like raise what the system says, unless it says that nothing is there.

    By default they answer False to every error. transformers asks them, so that a tokenizer whose file cannot be looked at
    for a moment loads without its merges and splits texts into characters, without a word.
    """
    kinds: dict[str, Callable[[int], bool]] = {"isfile": stat.S_ISREG, "isdir": stat.S_ISDIR, "exists": lambda _: True}

    def strictly(is_kind: Callable[[int], bool]) -> Callable[[Any], bool]:
        def ask(path: Any) -> bool:
            try:
                return is_kind(os.stat(path).st_mode)  # noqa: PTH116 - a path may be a number
            except ValueError:  # no path at all, such as one with a null character
                return False
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.EBADF, errno.ENAMETOOLONG):
                    return False
                raise

        return ask

    with replaced(*((os.path, name, strictly(is_kind)) for name, is_kind in kinds.items())):
        yield


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for the next tensor instead of returning it to the kernel. Does nothing without glibc.

    A forward pass allocates and frees tensors of tens of megabytes all the time. By default glibc maps each one anew and the
    kernel clears its pages, which makes a small model 1.24 to 1.31 times slower (measured). In exchange, the process keeps
    its largest size.
    """
    import ctypes
    import platform

    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3  # as in <malloc.h>
    libc.mallopt(mmap_threshold, 2**30)
    libc.mallopt(trim_threshold, 2**31 - 1)
    libc.mallopt(top_pad, 2**28)


@contextmanager
def quiet_hub() -> Generator[None]:
    """Silence the Hub client's log of its retries; if they fail, an error says so in one line."""
    from huggingface_hub.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def without_sparse_warning() -> None:
    """Let torch say now, unheard, that sparse matrices by rows are in beta. It says so once in a process."""
    import torch

    with warnings.catch_warnings(action="ignore"):
        torch.sparse_csr_tensor(torch.tensor([0, 0]), torch.empty(0, dtype=torch.long), torch.empty(0), (1, 1))
