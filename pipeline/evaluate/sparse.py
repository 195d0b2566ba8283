"""Holds latents without their zeros. Of thousands of latents some tens fire on a row, and only those cost anything.

On a CPU, scipy multiplies them as they are. A GPU multiplies matrices with their zeros faster than it looks up firings.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy import sparse

from pipeline.runtime.threads import one_thread, single_threads
from pipeline.sae.sae import SAE

BYTES_PER_FIRING = 4 + 4
"""An int32 index and a float32 value."""
DENSE_DECODING = 1 / 25
"""Share of latents that fire above which the dense product decodes faster: it runs on all cores, the sparse one on one."""
PAIR_COST = 200
"""How much more a pair of latents that fire on a row costs than a pair of latents in a dense product."""
PARTS = 8
"""Parts of a block that are multiplied one by one, each with the latents from its own first on."""
SMALLEST_PRODUCT = 192
"""Latents of such a part at least."""
DENSE_ROWS = 4096
"""Rows of a dense product: bounds the memory."""


@dataclass(frozen=True)
class SparseLatents:
    """Latents [B, F] of some rows. What is not zero is kept as it is, also where it is not finite."""

    value_N: torch.Tensor
    """float32: all that is not zero, row after row."""
    column_N: torch.Tensor
    """int32: the latent of each, ascending within a row."""
    start_b: torch.Tensor
    """int32 [B + 1]: where each row begins, and the last ends."""
    d_sae: int

    @classmethod
    def of(cls, f_BF: torch.Tensor) -> "SparseLatents":
        """The same latents, given with their zeros."""
        rows, columns = f_BF.nonzero().T
        start_b = torch.zeros(len(f_BF) + 1, dtype=torch.int32, device=f_BF.device)
        start_b[1:] = rows.bincount(minlength=len(f_BF)).cumsum(dim=0)
        return cls(f_BF[rows, columns], columns.int(), start_b, f_BF.shape[1])

    @cached_property
    def matrix(self) -> Any:
        """A `scipy.sparse.csr_matrix` of the same memory, which has no types. Of latents on the CPU."""
        arrays: Any = (self.value_N.numpy(), self.column_N.numpy(), self.start_b.numpy())
        return sparse.csr_matrix(arrays, shape=(len(self), self.d_sae))

    def __len__(self) -> int:
        """Rows."""
        return len(self.start_b) - 1

    @property
    def firings(self) -> int:
        """How many values are not zero."""
        return len(self.value_N)

    @property
    def on_cpu(self) -> bool:
        """Whether scipy can read them."""
        return self.value_N.device.type == "cpu"

    def dense(self) -> torch.Tensor:
        """The latents [B, F] with their zeros."""
        if self.on_cpu:
            return torch.from_numpy(self.matrix.toarray())
        f_BF = self.value_N.new_zeros(len(self), self.d_sae)
        rows = torch.arange(len(self), device=f_BF.device)
        row_N = rows.repeat_interleave(self.start_b.diff(), output_size=self.firings)
        f_BF.view(-1).scatter_(0, row_N * self.d_sae + self.column_N, self.value_N)
        return f_BF

    def fired_F(self) -> torch.Tensor:
        """int64 [F]: rows on which each latent fires."""
        return self.column_N[self.value_N > 0].bincount(minlength=self.d_sae)

    def decoded(self, sae: SAE) -> torch.Tensor:
        """The SAE's reconstruction [B, D]."""
        if not self.on_cpu or self.firings > DENSE_DECODING * len(self) * self.d_sae:
            return sae.decode(self.dense())
        return torch.from_numpy(self.matrix @ sae.W_dec_FD.numpy()) + sae.b_dec_D


def stacked(chunks: Iterable[SparseLatents], most_firings: int) -> Iterator[SparseLatents]:
    """Chunks put together until they have `most_firings` firings."""
    group: list[SparseLatents] = []
    firings = 0
    for chunk in chunks:
        group.append(chunk)
        firings += chunk.firings
        if firings >= most_firings:
            yield _together(group)
            group, firings = [], 0
    if group:
        yield _together(group)


def _together(group: Sequence[SparseLatents]) -> SparseLatents:
    if len(group) == 1:
        return group[0]
    ends = np.cumsum([0] + [chunk.firings for chunk in group[:-1]]).tolist()
    starts = [chunk.start_b[:-1] + end for chunk, end in zip(group, ends, strict=True)]
    last = group[-1].start_b[-1:] + ends[-1]
    return SparseLatents(
        torch.cat([chunk.value_N for chunk in group]),
        torch.cat([chunk.column_N for chunk in group]),
        torch.cat([*starts, last]),
        group[0].d_sae,
    )


def add_pairs(latents: SparseLatents, block: slice, joint_bF: torch.Tensor, strength_bF: torch.Tensor) -> None:
    """Add the rows on which a latent of the block and one of a higher index both fire, and the sums of their products.

    Other entries are left undefined. On a CPU the cost grows with the square of the latents that fire on a row, not with
    that of all latents; where many fire, dense products are cheaper.
    """
    if latents.on_cpu and _few_fire(latents):
        matrix = latents.matrix
        ones = (matrix.data > 0).astype(np.int32)
        fires = sparse.csr_matrix((ones, matrix.indices, matrix.indptr), shape=matrix.shape)
        joint_bF += torch.from_numpy((_columns(fires, block) @ fires).toarray())
        strength_bF += torch.from_numpy((_columns(matrix, block) @ matrix).toarray())
        return
    for f_BF in _dense_parts(latents):
        _add_upper(f_BF, block, strength_bF)
        _add_upper((f_BF > 0).float(), block, joint_bF)  # exact: float32 counts to 2^24 rows


def _add_upper(f_BF: torch.Tensor, block: slice, sum_bF: torch.Tensor) -> None:
    """Add the products of the block's latents with all from the first of their part on: little more than the pairs."""
    size = max(SMALLEST_PRODUCT, (block.stop - block.start) // PARTS)

    def add(first: int) -> None:
        some = slice(first, min(first + size, block.stop))
        into = sum_bF[some.start - block.start : some.stop - block.start, first:]
        into.addmm_(f_BF[:, some].T, f_BF[:, first:])

    parts = range(block.start, block.stop, size)
    if f_BF.device.type != "cpu":
        for first in parts:
            add(first)
        return
    # One thread for each: several would share the rows of a small product, and sums would depend on their number.
    with one_thread(), single_threads() as pool:
        list(pool.map(add, parts))


def _few_fire(latents: SparseLatents) -> bool:
    firing_B = np.diff(latents.matrix.indptr).astype(np.float64)
    return bool(PAIR_COST * (firing_B**2).sum() < len(latents) * float(latents.d_sae) ** 2)


def _dense_parts(latents: SparseLatents) -> Iterator[torch.Tensor]:
    if not latents.on_cpu:
        yield latents.dense()
        return
    for first in range(0, len(latents), DENSE_ROWS):
        yield torch.from_numpy(latents.matrix[first : first + DENSE_ROWS].toarray())


def _columns(matrix: Any, block: slice) -> Any:
    """The columns of a block, transposed."""
    whole = block.stop - block.start == matrix.shape[1]
    return (matrix if whole else matrix[:, block]).T.tocsr()
