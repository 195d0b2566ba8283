"""Reads the held-out rows of a layer, and encodes one SAE's latents on them once for all evaluations."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from pipeline.sae.sae import SAE
from pipeline.store.batches import rows_in_order
from pipeline.store.reader import ActivationStore

KEPT_BYTES = 2**30
"""Memory for the kept latents of one SAE: 500,000 rows on each of which 100 latents fire."""
BYTES_PER_FIRING = 2 * 8 + 4
"""A kept latent has two int64 indices and a float32 value."""


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
        self._kept: list[torch.Tensor] = []
        self._free = KEPT_BYTES
        self._complete = False

    def __iter__(self) -> Iterator[torch.Tensor]:
        if self._complete:
            return (kept_BF.to_dense() for kept_BF in self._kept)
        return (f_BF for _, f_BF in self.with_rows())

    def with_rows(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Rows [B, D] and their latents [B, F]."""
        chunks = 0
        for chunks, x_BD in enumerate(self.chunks, start=1):
            yield x_BD, self._of_chunk(chunks - 1, x_BD)
        self._complete = len(self._kept) == chunks

    def _of_chunk(self, number: int, x_BD: torch.Tensor) -> torch.Tensor:
        if number < len(self._kept):
            return self._kept[number].to_dense()
        f_BF = self.sae.encode(x_BD)
        if number == len(self._kept):
            self._keep(f_BF)
        return f_BF

    def _keep(self, f_BF: torch.Tensor) -> None:
        taken = BYTES_PER_FIRING * int(f_BF.count_nonzero())
        if taken <= self._free:
            self._free -= taken
            self._kept.append(f_BF.to_sparse())
