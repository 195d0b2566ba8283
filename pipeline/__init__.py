"""A bench for sparse autoencoders: extract activations once, train every arm of a study on them, evaluate, compare.

This module exports what a notebook needs (docs/quickstart.md). To read the code, start at `pipeline.study.plan`, which lists
what a study consists of, or at `pipeline.cli`, which has the commands.
"""

import os
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.artefacts.workspace import Workspace
    from pipeline.extract.reading import TextReader
    from pipeline.report.frame import read_results
    from pipeline.sae.finished import load_sae
    from pipeline.sae.sae import SAE
    from pipeline.store.batches import rows_in_order, shuffled_batches
    from pipeline.store.reader import ActivationStore
    from pipeline.study.experiment import Experiment
    from pipeline.study.plan import make_plan

__all__ = [
    "SAE",
    "ActivationStore",
    "Experiment",
    "TextReader",
    "Workspace",
    "load_sae",
    "make_plan",
    "read_results",
    "rows_in_order",
    "shuffled_batches",
]

_HOMES = {
    "SAE": "pipeline.sae.sae",
    "ActivationStore": "pipeline.store.reader",
    "Experiment": "pipeline.study.experiment",
    "TextReader": "pipeline.extract.reading",
    "Workspace": "pipeline.artefacts.workspace",
    "load_sae": "pipeline.sae.finished",
    "make_plan": "pipeline.study.plan",
    "read_results": "pipeline.report.frame",
    "rows_in_order": "pipeline.store.batches",
    "shuffled_batches": "pipeline.store.batches",
}
"""The module of each public name. Each is imported on first use, so that `dasae --help` does not wait for torch."""

# torch's OpenMP threads wait for each other in a long busy loop by default. With another process on the same two cores, that
# made training the demo model twenty times slower (520 instead of 11,000 tokens/s). A process alone loses little by a short
# loop (20,000 instead of 23,000 tokens/s). OpenMP reads this once, when torch loads it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# The same for OpenBLAS, the threads of numpy and scipy: 2**10 clock cycles. A logistic regression makes thousands of
# products of some microseconds, and on two busy cores each waited milliseconds for a thread without a core (12 s instead of
# 0.3 s for twelve regressions). The numbers stay the same. OpenBLAS reads this when numpy loads it.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "10")
# Otherwise a tokenizer that was used before a fork (any subprocess) prints a warning about its threads.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

try:
    __version__ = version("direction-aware-sae")
except PackageNotFoundError:  # a checkout that was not installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
