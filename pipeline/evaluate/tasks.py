"""Runs the probe tasks of one layer, on the model itself and on several SAEs at once.

The texts of a data set are read once for all SAEs that are probed together. No SAE's random numbers depend on those beside
it. On a CPU each SAE has one thread, and torch none of its own: with operations this
small, its threads mostly wait for each other. On a GPU the SAEs encode one after the other. Their probes are trained on the
CPU all the same, to sae-bench's bits: a probe is thousands of steps on 250 rows, which a GPU takes longer to launch.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from functools import cached_property, partial
from operator import methodcaller
from typing import Any, cast

import torch

from pipeline.errors import DegenerateSAEError, InterruptedRunError
from pipeline.evaluate import probing
from pipeline.evaluate.probes import Features, Split
from pipeline.evaluate.probing import Accuracies
from pipeline.runtime.devices import CPU
from pipeline.runtime.interrupt import stop_requested
from pipeline.runtime.memory import free_memory
from pipeline.runtime.threads import one_thread, single_threads
from pipeline.sae.sae import SAE
from pipeline.store.batches import ahead
from pipeline.store.documents import SPLITS, Documents
from pipeline.store.documents import Split as SplitName

SHARE = 0.5
"""Share of the free memory that SAEs probed at once may take."""
COPIES = 3
"""Copies of a data set's features while an SAE is probed: by class, all classes together, and the rows of one problem."""
MOST_AT_ONCE = 64
"""SAEs probed side by side on a GPU."""

STOPPED = "stopped on request; evaluation goes on with the same command"

Scores = dict[str, Accuracies]
"""By data set."""


@dataclass(frozen=True)
class Probing:
    """What the probes of all data sets found."""

    scores: Scores
    of_texts: dict[str, dict[str, torch.Tensor]]
    """By data set and by `all` or k, what each test document adds to the data set's score; empty in sae-bench's order."""


@dataclass(frozen=True, kw_only=True)
class ProbeTasks:
    """Data sets by name, and the settings of their probes."""

    documents: Mapping[str, Documents]
    k_values: Sequence[int]
    seed: int
    draws: int
    """Draws of every problem; 0 for one in sae-bench's order of random numbers."""
    device: torch.device = CPU
    """Where documents are encoded."""

    def at_once(self, d_in: int, d_sae: int) -> int:
        """Number of SAEs to probe side by side: as many as fit into memory, on a CPU at most one per core; at least one."""
        most = max((len(documents.store.whole("label")) for documents in self.documents.values()), default=0)
        fitting = int(free_memory(CPU) * SHARE / max(1, COPIES * 4 * most * d_sae))
        if self.device.type == "cpu":
            return max(1, min(os.cpu_count() or 1, fitting))
        there = int(free_memory(self.device) * SHARE / (2 * 4 * d_in * d_sae))
        return max(1, min(MOST_AT_ONCE, fitting, there))

    def of_model(self) -> Scores:
        """Scores of the residual stream itself."""
        (found,) = self._found([None])
        if isinstance(found, DegenerateSAEError):
            raise found
        return found.scores

    def of_saes(self, saes: Sequence[SAE]) -> list[Probing | DegenerateSAEError]:
        """What was found of each SAE, or why it could not be probed. Raises InterruptedRunError when asked to stop."""
        return self._found(saes)

    @cached_property
    def threads(self) -> ThreadPoolExecutor:
        """The same threads for every group: glibc keeps freed memory per thread, and new threads would keep more."""
        return single_threads()

    def _found(self, encoders: Sequence[SAE | None]) -> list[Probing | DegenerateSAEError]:
        probed = [_Probed(sae, torch.Generator().manual_seed(self.seed)) for sae in encoders]
        with one_thread():
            for name, documents in self.documents.items():
                if not (sound := [one for one in probed if one.refused is None]):
                    break
                train, test = (self._pooled(documents, split, sound) for split in SPLITS)
                list(self.threads.map(partial(self._probe, name), sound, train, test))
        return [one.refused or one.found for one in probed]

    def _probe(self, dataset: str, probed: "_Probed", train: Features, test: Features) -> None:
        if probed.sae:
            try:
                probing.check_not_degenerate(dataset, train, self.k_values)
            except DegenerateSAEError as error:
                probed.refused = error
                return
        rows = Split.of(train), Split.of(test)
        if not self.draws:
            probed.found.scores[dataset] = probing.probe_in_order(*rows, self.k_values, probed.generator)
            return
        found = probing.probe(dataset, *rows, self.k_values, self.seed, self.draws)
        probed.found.scores[dataset], probed.found.of_texts[dataset] = found.accuracies, found.of_texts

    def _pooled(self, documents: Documents, split: SplitName, probed: Sequence["_Probed"]) -> list[Features]:
        """The features of every SAE on the documents of a split, each of which is read once."""
        stop = stop_requested()
        each: Callable[..., Iterable[Any]] = cast("Any", self.threads.map if self.device.type == "cpu" else map)
        pools = [probing.Pool(one.sae.encode if one.sae else None) for one in probed]
        with closing(ahead(documents.padded(split, probing.POOLING_BATCH))) as batches:
            for name, acts_SLD in batches:
                parts = probing.parts(acts_SLD.to(self.device))
                if stop.is_set():
                    raise InterruptedRunError(STOPPED)
                list(each(methodcaller("update", name, parts), pools))
        return [pool.features() for pool in pools]


@dataclass
class _Probed:
    """An SAE while it is probed, or the model itself."""

    sae: SAE | None
    generator: torch.Generator
    """Draws in sae-bench's order."""
    found: Probing = field(default_factory=lambda: Probing({}, {}))
    refused: DegenerateSAEError | None = None
