"""The contrastive penalty from the latents that fire, for a CPU. Weighted penalty only: unweighted, all pairs count.

Local shape: k latents taken from each row.
"""

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from scipy import sparse

from pipeline.train.pair_selection import SelectedPairs, pair_weights
from pipeline.train.penalty import Accumulator

GATHERED = 1_000_000
"""Numbers gathered at once: 4 MB bound the memory and fit a cache."""


@dataclass(frozen=True)
class Firings:
    """The latents of a batch that fire, row by row."""

    row: torch.Tensor
    latent: torch.Tensor
    value: torch.Tensor
    count_B: torch.Tensor
    """How many fire on each row."""

    @classmethod
    def of(cls, f_BF: torch.Tensor) -> "Firings":
        """Find them in latents [B, F]."""
        row, latent = f_BF.nonzero().T
        return cls(row, latent, f_BF[row, latent], row.bincount(minlength=len(f_BF)))

    def times(self, matrix: torch.Tensor) -> torch.Tensor:
        """f @ matrix."""
        return _product(self.row, self.latent, self.value, len(self.count_B), matrix)

    def transposed_times(self, matrix: torch.Tensor, d_sae: int) -> torch.Tensor:
        """f^T @ matrix."""
        return _product(self.latent, self.row, self.value, d_sae, matrix)


def _product(row: torch.Tensor, column: torch.Tensor, value: torch.Tensor, rows: int, matrix: torch.Tensor) -> torch.Tensor:
    size = (rows, len(matrix))
    # Not coalesced: sorting would take longer than the product. Invariants hold by construction.
    left = torch.sparse_coo_tensor(torch.stack([row, column]), value, size, check_invariants=False)
    return cast("torch.Tensor", torch.sparse.mm(left, matrix))  # torch.sparse has no types


def by_table(pairs: SelectedPairs, into: Accumulator | None) -> torch.Tensor:
    """sum_j M_ij D_ij G_ij [F] from tables of M o D and G, which only products with the latents that fire fill and read."""
    latents, rows = len(pairs.W_dec_FD), len(pairs.f_BF)
    everything = slice(0, latents)
    fires = Firings.of(pairs.f_BF)
    selected_FF = torch.mm(pairs.W_dec_FD, pairs.W_dec_FD.T)
    mask_FF = pairs.mask(selected_FF, everything, everything)
    selected_FF *= mask_FF
    f_gradient_BF = fires.times(selected_FF)
    pull = f_gradient_BF[fires.row, fires.latent].mul_(fires.value)
    strength_F = torch.zeros_like(pairs.norm_F).index_add_(0, fires.latent, pull).div_(rows)
    if into is None:
        return strength_F
    into.f_BF.add_(f_gradient_BF, alpha=into.weight / rows)
    joint_FF = fires.transposed_times(pairs.f_BF, latents).mul_(mask_FF)
    into.W_dec_FD.addmm_(joint_FF, pairs.W_dec_FD, alpha=into.weight / rows)
    return strength_F


def by_rows(pairs: SelectedPairs, into: Accumulator | None) -> torch.Tensor:
    """The same from the pairs that fire together on a row and are selected, a chunk of rows at a time."""
    sums = _Sums(torch.zeros_like(pairs.norm_F))
    fires = Firings.of(pairs.f_BF)
    count_B, order_B = fires.count_B.sort()
    counts = [int(count) for count in count_B]
    stop = len(counts)
    # Rows with the most firing latents first, so that the rows of a chunk have about equally many.
    while stop and counts[stop - 1] > 1:
        most = counts[stop - 1]
        start = max(0, stop - max(1, GATHERED // (most * pairs.W_dec_FD.shape[1])))
        _rows(pairs, fires, order_B[start:stop], most, into, sums)
        stop = start
    if into:
        sums.add_to(into.W_dec_FD, pairs.W_dec_FD, into.weight / len(pairs.f_BF))
    return sums.strength_F


@dataclass
class _Sums:
    """What the chunks of rows add up to."""

    strength_F: torch.Tensor
    first: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    second: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    joint: list[torch.Tensor] = field(default_factory=list[torch.Tensor])
    """Selected pairs on a row, and the product of their latents."""

    def add_to(self, gradient_FD: torch.Tensor, W_FD: torch.Tensor, factor: float) -> None:
        """Add `factor` (M o G) W to the gradient."""
        if not self.joint:
            return
        latents = len(W_FD)
        entries: Any = (torch.cat(self.joint).numpy(), (torch.cat(self.first).numpy(), torch.cat(self.second).numpy()))
        # As rows of a matrix each pair counts once, however many rows it fires on.
        table: Any = sparse.coo_matrix(entries, shape=(latents, latents)).tocsr().tocoo()
        row, column, value = (torch.from_numpy(part) for part in (table.row, table.col, table.data))
        gradient_FD.add_(_product(row.long(), column.long(), value, latents, W_FD), alpha=factor)


def _rows(
    pairs: SelectedPairs, fires: Firings, rows_B: torch.Tensor, most: int, into: Accumulator | None, sums: _Sums
) -> None:
    starts_B = fires.count_B.cumsum(0) - fires.count_B
    rank_k = torch.arange(most)
    # Rows with fewer firing latents repeat one, with value 0.
    fires_Bk = rank_k < fires.count_B[rows_B, None]
    place_Bk = (starts_B[rows_B, None] + rank_k).clamp_(max=len(fires.latent) - 1)
    index_Bk, f_Bk = fires.latent[place_Bk], fires.value[place_Bk] * fires_Bk
    W_BkD = pairs.W_dec_FD.index_select(0, index_Bk.flatten()).view(*index_Bk.shape, -1)
    dot_Bkk = torch.bmm(W_BkD, W_BkD.mT)
    norm_Bk, threshold_Bk = pairs.norm_F[index_Bk], pairs.threshold_F[index_Bk]
    similarity_Bkk = pairs.similarity(dot_Bkk, norm_Bk[:, :, None] * norm_Bk[:, None])
    mask_Bkk = pair_weights(similarity_Bkk, threshold_Bk[:, :, None], threshold_Bk[:, None], pairs.config.select)
    mask_Bkk = mask_Bkk.mul_(fires_Bk[:, :, None]).mul_(fires_Bk[:, None])
    mask_Bkk.diagonal(dim1=1, dim2=2).zero_()

    pair = mask_Bkk.flatten().nonzero().squeeze(1)
    first, second = pair // most, pair // most**2 * most + pair % most
    weight, f = mask_Bkk.flatten()[pair], f_Bk.flatten()
    pull = torch.zeros_like(f).index_add_(0, first, dot_Bkk.flatten()[pair] * weight * f[second])
    pull /= len(pairs.f_BF)
    index = index_Bk.flatten()
    sums.strength_F.index_add_(0, index, pull * f)
    if into is None:
        return
    sums.first.append(index[first])
    sums.second.append(index[second])
    sums.joint.append(f[first] * f[second] * weight)
    # Added, because the places of silent latents repeat one that fires, with a pull of 0.
    flat = (rows_B[:, None] * pairs.f_BF.shape[1] + index_Bk).flatten()
    into.f_BF.view(-1).index_add_(0, flat, pull, alpha=into.weight)
