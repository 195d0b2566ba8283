"""Runs the probe tasks of one layer, on the model itself and on several SAEs at once.

Each SAE has one thread and its own random numbers, so that its scores do not depend on the SAEs beside it. torch uses no
threads of its own meanwhile: with operations this small, its threads mostly wait for each other.
"""

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cached_property

import torch

from pipeline.errors import InterruptedRunError
from pipeline.evaluate import probing
from pipeline.evaluate.probes import Features
from pipeline.runtime.interrupt import stop_requested
from pipeline.runtime.memory import free_memory
from pipeline.runtime.threads import one_thread
from pipeline.sae.sae import SAE
from pipeline.store.documents import SPLITS, Documents

SHARE = 0.5
"""Share of the free memory that SAEs probed at once may take."""
COPIES = 3
"""Copies of a data set's features while an SAE is probed: by class, all classes together, and the rows of one problem."""


@dataclass(frozen=True, kw_only=True)
class ProbeTasks:
    """Data sets by name, and the settings of their probes."""

    documents: Mapping[str, Documents]
    k_values: Sequence[int]
    seed: int

    def at_once(self, d_sae: int) -> int:
        """Number of SAEs to probe side by side: one per core if they fit into memory, at least one."""
        most = max((len(documents.store.whole("label")) for documents in self.documents.values()), default=0)
        fitting = int(free_memory(torch.device("cpu")) * SHARE / max(1, COPIES * 4 * most * d_sae))
        return max(1, min(os.cpu_count() or 1, fitting))

    def of_model(self) -> dict[str, probing.Accuracies]:
        """Scores of the residual stream itself, by data set."""
        with one_thread():
            return probing.probe(self._features(None), self.k_values, self.seed)

    def of_saes(self, saes: Sequence[SAE]) -> list[Future[dict[str, probing.Accuracies]]]:
        """Probe SAEs side by side; returns when all are done, for each SAE a future of its scores by data set.

        The future of a degenerate SAE raises DegenerateSAEError.
        """
        stop = stop_requested()

        def scores(sae: SAE) -> dict[str, probing.Accuracies]:
            return probing.probe(self._sae_features(sae, stop), self.k_values, self.seed)

        with one_thread():
            scored = [self.threads.submit(scores, sae) for sae in saes]
            try:
                wait(scored)
            except BaseException:
                stop.set()  # or the end of the process waits until all SAEs are probed
                raise
        return scored

    @cached_property
    def threads(self) -> ThreadPoolExecutor:
        """The same threads for every group: glibc keeps freed memory per thread, and new threads would keep more."""
        return ThreadPoolExecutor(os.cpu_count())

    def _sae_features(self, sae: SAE, stop: threading.Event) -> Iterator[tuple[str, Features, Features]]:
        def encode(x_RD: torch.Tensor) -> torch.Tensor:
            if stop.is_set():
                raise InterruptedRunError("stopped while probing")
            return sae.encode(x_RD)

        for name, train, test in self._features(encode):
            probing.check_not_degenerate(name, train, self.k_values)
            yield name, train, test

    def _features(self, encode: Callable[[torch.Tensor], torch.Tensor] | None) -> Iterator[tuple[str, Features, Features]]:
        for name, documents in self.documents.items():
            train, test = (probing.pool(documents.padded(split, probing.POOLING_BATCH), encode) for split in SPLITS)
            yield name, train, test
