"""Holds latents without their zeros. Of thousands of latents some tens fire on a row, and only those cost anything."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse

from pipeline.sae.sae import SAE

BYTES_PER_FIRING = 4 + 4
"""An int32 index and a float32 value."""
DENSE_DECODING = 1 / 25
"""Share of latents that fire above which the dense product decodes faster: it runs on all cores, the sparse one on one."""
PAIR_COST = 200
"""How much more a pair of latents that fire on a row costs than a pair of latents in a dense product."""
DENSE_ROWS = 4096
"""Rows of a dense product: bounds the memory."""


@dataclass(frozen=True)
class SparseLatents:
    """Latents [B, F] of some rows. What is not zero is kept as it is, also where it is not finite."""

    matrix: Any
    """A `scipy.sparse.csr_matrix`, which has no types: float32, with int32 indices in ascending order."""

    @classmethod
    def of(cls, f_BF: torch.Tensor) -> "SparseLatents":
        """The same latents, given with their zeros."""
        rows, columns = f_BF.nonzero().T
        starts = torch.zeros(len(f_BF) + 1, dtype=torch.int32)
        torch.cumsum(rows.bincount(minlength=len(f_BF)), dim=0, out=starts[1:])
        arrays: Any = (f_BF[rows, columns].numpy(), columns.int().numpy(), starts.numpy())
        return cls(sparse.csr_matrix(arrays, shape=tuple(f_BF.shape)))

    @property
    def firings(self) -> int:
        """How many values are not zero."""
        return int(self.matrix.nnz)

    def dense(self) -> torch.Tensor:
        """The latents [B, F] with their zeros."""
        return torch.from_numpy(self.matrix.toarray())

    def fired_F(self) -> torch.Tensor:
        """int64 [F]: rows on which each latent fires."""
        fires = self.matrix.indices[self.matrix.data > 0]
        return torch.from_numpy(np.bincount(fires, minlength=self.matrix.shape[1]))

    def decoded(self, sae: SAE) -> torch.Tensor:
        """The SAE's reconstruction [B, D]."""
        rows, latents = self.matrix.shape
        if self.firings > DENSE_DECODING * rows * latents:
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
    return SparseLatents(sparse.vstack([chunk.matrix for chunk in group], format="csr")) if len(group) > 1 else group[0]


def add_pairs(latents: SparseLatents, block: slice, joint_bF: torch.Tensor, strength_bF: torch.Tensor) -> None:
    """Add the rows on which a latent of the block and any latent both fire, and the sums of their products.

    The cost grows with the square of the latents that fire on a row, not with that of all latents; where many fire, dense
    products are cheaper.
    """
    matrix = latents.matrix
    rows, d_sae = matrix.shape
    firing_B = np.diff(matrix.indptr).astype(np.float64)
    if PAIR_COST * (firing_B**2).sum() < rows * float(d_sae) ** 2:
        ones = (matrix.data > 0).astype(np.int32)
        fires = sparse.csr_matrix((ones, matrix.indices, matrix.indptr), shape=matrix.shape)
        joint_bF += torch.from_numpy((_columns(fires, block) @ fires).toarray())
        strength_bF += torch.from_numpy((_columns(matrix, block) @ matrix).toarray())
        return
    for first in range(0, rows, DENSE_ROWS):
        f_BF = torch.from_numpy(matrix[first : first + DENSE_ROWS].toarray())
        strength_bF.addmm_(f_BF[:, block].T, f_BF)
        fired_BF = (f_BF > 0).float()
        joint_bF.addmm_(fired_BF[:, block].T, fired_BF)  # exact: float32 counts to 2^24 rows


def _columns(matrix: Any, block: slice) -> Any:
    """The columns of a block, transposed."""
    whole = block.stop - block.start == matrix.shape[1]
    return (matrix if whole else matrix[:, block]).T.tocsr()
