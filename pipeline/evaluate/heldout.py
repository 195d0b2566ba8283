"""Reads the held-out rows of a layer once for all its SAEs, and encodes each SAE's latents on them once."""

from collections.abc import Iterable, Iterator, Sequence

import torch

from pipeline.evaluate.sparse import BYTES_PER_FIRING, SparseLatents
from pipeline.runtime.devices import CPU
from pipeline.runtime.memory import free_memory
from pipeline.sae.sae import SAE
from pipeline.store.reader import ActivationStore

KEPT_ROWS = 0.25
"""Share of the device's free memory for the rows of a layer. What does not fit is read again for every SAE."""

KEPT_BYTES = 2**30
"""Memory for the kept latents of one SAE: 1,300,000 rows on each of which 100 latents fire."""


class HeldoutRows:
    """The held-out rows of a layer, chunk by chunk: float32 [B, D] on a device, unscaled, equal in every loop.

    The first loop reads the store. Chunks are kept in the store's dtype while they fit, and only the others are read again.
    """

    def __init__(self, store: ActivationStore, layer: int, shards: Sequence[int], device: torch.device = CPU):
        self.store, self.layer, self.shards, self.device = store, layer, shards, device
        self._kept: dict[tuple[int, int], torch.Tensor] = {}
        self._free = KEPT_ROWS * free_memory(device)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (self._chunk(*bounds).float() for bounds in self.store.chunks(self.shards))

    def _chunk(self, start: int, stop: int) -> torch.Tensor:
        if (kept_BD := self._kept.get((start, stop))) is not None:
            return kept_BD
        x_BD = self.store.read(self.layer, start, stop).to(self.device)
        if x_BD.nbytes <= self._free:
            self._free -= x_BD.nbytes
            self._kept[start, stop] = x_BD
        return x_BD

    def mean_D(self) -> torch.Tensor:
        """The mean row, float32."""
        rows, sum_D = 0, torch.zeros(self.store.layout.d_in, dtype=torch.float64, device=self.device)
        for x_BD in self:
            rows += len(x_BD)
            sum_D += x_BD.sum(dim=0, dtype=torch.float64)
        return (sum_D / rows).float()


class Latents:
    """Latents of an SAE on the rows of `chunks`, chunk by chunk: [B, F], equal in every loop.

    The first loop encodes. Latents that fire are kept, up to KEPT_BYTES; only chunks beyond that are read and encoded again
    by later loops.
    """

    def __init__(self, sae: SAE, chunks: Iterable[torch.Tensor]):
        self.sae, self.chunks = sae, chunks
        self._kept: list[SparseLatents] = []
        self._free = KEPT_BYTES
        self._complete = False

    def __iter__(self) -> Iterator[torch.Tensor]:
        return (latents.dense() for latents in self.sparse())

    def sparse(self) -> Iterator[SparseLatents]:
        """The same, without the zeros."""
        if self._complete:
            return iter(self._kept)
        return (latents for _, latents in self.with_rows())

    def with_rows(self) -> Iterator[tuple[torch.Tensor, SparseLatents]]:
        """Rows [B, D] and their latents."""
        chunks = 0
        for chunks, x_BD in enumerate(self.chunks, start=1):
            yield x_BD, self._of_chunk(chunks - 1, x_BD)
        self._complete = len(self._kept) == chunks

    def _of_chunk(self, number: int, x_BD: torch.Tensor) -> SparseLatents:
        if number < len(self._kept):
            return self._kept[number]
        latents = SparseLatents.of(self.sae.encode(x_BD))
        taken = BYTES_PER_FIRING * latents.firings
        if number == len(self._kept) and taken <= self._free:
            self._free -= taken
            self._kept.append(latents)
        return latents
