"""Reads the held-out rows of a layer, and encodes one SAE's latents on them once for all evaluations."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from pipeline.evaluate.sparse import BYTES_PER_FIRING, SparseLatents
from pipeline.sae.sae import SAE
from pipeline.store.batches import rows_in_order
from pipeline.store.reader import ActivationStore

KEPT_BYTES = 2**30
"""Memory for the kept latents of one SAE: 1,300,000 rows on each of which 100 latents fire."""


@dataclass(frozen=True)
class HeldoutRows:
    """The held-out rows of a layer, chunk by chunk: float32 [B, D], unscaled. Every loop reads the store again."""

    store: ActivationStore
    layer: int
    shards: Sequence[int]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return rows_in_order(self.store, self.layer, self.shards)

    def mean_D(self) -> torch.Tensor:
        """The mean row, float32."""
        rows, sum_D = 0, torch.zeros(self.store.layout.d_in, dtype=torch.float64)
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
