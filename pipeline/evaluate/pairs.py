"""Measures pairs of latents: which pairs fire together most, and how strongly those with similar directions do.

Pairs are counted a block of latents at a time: of 16,384 latents, one float32 matrix of all pairs takes 1 GB.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Self, cast

import torch

from pipeline.evaluate.sparse import SparseLatents, add_pairs, stacked
from pipeline.runtime import devices
from pipeline.runtime.devices import CPU
from pipeline.sae.sae import SAE
from pipeline.study.sections import EvaluateConfig

GROUP_FIRINGS = 2**24
"""Firings of the rows whose pairs are counted at once: 128 MB, and four times that while they are counted."""
PANEL_BYTES = 256 * 2**20
"""Size on a CPU of the float32 matrix [p, F] of the latents whose pairs are counted in one pass over the rows."""
BLOCK_BYTES = 64 * 2**20
"""Size of a block's float32 matrix [b, F]: b is 1,024 of 16,384 latents, and all of up to 4,096."""
MOST_PAIRS = 4.0
"""How many pairs that fire together most are kept, as a multiple of the number of live latents."""


@dataclass(frozen=True)
class PairBlock:
    """How often and how strongly the latents of a block fire together with each latent of a higher index."""

    first: int
    """The block is the latents `first` to `first + b`."""
    joint_bF: torch.Tensor
    """Rows on which both fire."""
    strength_bF: torch.Tensor
    """Sum over rows of the product of both latents. Decoder rows have norm 1, so that latents are strengths."""

    @property
    def latents(self) -> slice:
        """The block's own latents."""
        return slice(self.first, self.first + len(self.joint_bF))


def blocks_of(latents: int, most: int | None = None) -> list[slice]:
    """Latents in blocks: a float32 matrix [b, `latents`] takes at most `most` bytes, BLOCK_BYTES by default."""
    size = max(1, (BLOCK_BYTES if most is None else most) // (4 * max(1, latents)))
    return [slice(first, min(first + size, latents)) for first in range(0, latents, size)]


def pair_blocks(
    latents: Callable[[], Iterable[SparseLatents]], d_sae: int, device: torch.device = CPU
) -> Iterator[PairBlock]:
    """Every pair i < j once; entries with j <= i are 0. `latents()` gives the chunks of all rows, every time the same."""
    for panel in blocks_of(d_sae, PANEL_BYTES if device.type == "cpu" else devices.PANEL_BYTES):
        joint_bF = torch.zeros(panel.stop - panel.start, d_sae, device=device)
        strength_bF = torch.zeros_like(joint_bF)
        for group in stacked(latents(), GROUP_FIRINGS) if device.type == "cpu" else latents():
            add_pairs(group, panel, joint_bF, strength_bF)
        size = blocks_of(d_sae)[0].stop
        for first in range(panel.start, panel.stop, size):
            block = slice(first - panel.start, first - panel.start + size)
            yield PairBlock(first, joint_bF[block].triu_(first + 1), strength_bF[block].triu_(first + 1))


def firings(latents: Iterable[SparseLatents]) -> torch.Tensor:
    """int64 [F]: rows on which each latent fires, of one or more chunks [B, F]."""
    return torch.stack([chunk.fired_F() for chunk in latents]).sum(dim=0)


class TopPairs:
    """The pairs with the largest scores among those offered, largest first, ties to the lower indices."""

    def __init__(self, size: int, device: torch.device):
        self.size = size
        self.pair_P2 = torch.zeros(0, 2, dtype=torch.int64, device=device)
        self.score_P = torch.zeros(0, device=device)
        self.strength_P = torch.zeros(0, device=device)

    def offer(self, block: PairBlock, score_bF: torch.Tensor) -> None:
        """Take in the pairs of a block, blocks in ascending order. A score of -inf leaves a pair out."""
        largest = score_bF.flatten().topk(min(self.size, score_bF.numel())).values
        # topk keeps any of several equal scores: let in all that tie with its last, and sort them out below.
        row_P, column_P = ((score_bF >= largest[-1]) & (score_bF > -torch.inf)).nonzero(as_tuple=True)
        pair_P2 = torch.cat([self.pair_P2, torch.stack([row_P + block.first, column_P], dim=1)])
        score_P = torch.cat([self.score_P, score_bF[row_P, column_P]])
        strength_P = torch.cat([self.strength_P, block.strength_bF[row_P, column_P]])
        kept = score_P.sort(descending=True, stable=True).indices[: self.size]
        self.pair_P2, self.score_P, self.strength_P = pair_P2[kept], score_P[kept], strength_P[kept]

    def __len__(self) -> int:
        return len(self.pair_P2)


class CofiringPairs:
    """The pairs of live latents that fire together most. Call `update` with every block of pairs.

    `fired_F` are the firings of each latent on `rows` rows; with `live_firings` of them it is live. Of pairs that fire
    together on `joint_firings` rows or more, MOST_PAIRS times the number of live latents are kept by each of two scores: by
    the mean product of strengths, and by the phi coefficient of firing, (p_ij - p_i p_j) / sqrt(p_i q_i p_j q_j).
    """

    def __init__(self, fired_F: torch.Tensor, rows: int, config: EvaluateConfig):
        self.rows, self.joint_firings = rows, config.joint_firings
        self.live_F = fired_F >= config.live_firings
        self.live_N = self.live_F.nonzero().squeeze(1)
        """int64: the indices of live latents, ascending."""
        size = max(1, round(MOST_PAIRS * len(self.live_N)))
        self.by_strength, self.by_phi = TopPairs(size, fired_F.device), TopPairs(size, fired_F.device)
        self.p_F = fired_F.double() / rows
        self.variance_F = self.p_F * (1 - self.p_F)

    def update(self, block: PairBlock) -> None:
        """Take in a block of pairs, blocks in ascending order."""
        out_bF = block.joint_bF < self.joint_firings
        out_bF |= ~(self.live_F[block.latents, None] & self.live_F)
        self.by_strength.offer(block, block.strength_bF.masked_fill(out_bF, -torch.inf))
        # Doubles, and one operation at a time: a fused one rounds differently at the edge of a block, and equal phis would
        # be ranked by where they stand in it.
        phi_bF = block.joint_bF.double() / self.rows
        phi_bF -= self.p_F[block.latents, None] * self.p_F
        phi_bF /= (self.variance_F[block.latents, None] * self.variance_F).sqrt_()
        # The phi of a latent that fires on every row is not finite.
        self.by_phi.offer(block, phi_bF.masked_fill_(out_bF | ~phi_bF.isfinite(), -torch.inf))


def topk_mask(direction_ND: torch.Tensor, fraction: float) -> torch.Tensor:
    """bool [N, N]: row i holds its k = max(1, int(fraction (N - 1))) most similar others, ties to the lower index."""
    return TopK(direction_ND, [fraction]).level_NN < 1


class TopK:
    """The masks of several fractions at once."""

    def __init__(self, direction_ND: torch.Tensor, fractions: Iterable[float]):
        latents, device = len(direction_ND), direction_ND.device
        self.fractions = sorted(set(fractions))
        k_G = torch.tensor([max(1, int(fraction * (latents - 1))) for fraction in self.fractions], device=device)
        rank_K = torch.arange(max(0, min(int(k_G[-1]), latents - 1)), device=device)
        level_K = torch.searchsorted(k_G, rank_K, right=True).to(torch.uint8)
        self.level_NN = torch.full((latents, latents), len(k_G), dtype=torch.uint8, device=device)
        """For every ordered pair the index of the first fraction whose mask holds it; after the last if none does."""
        for block in blocks_of(latents):
            cosine_bN = direction_ND[block] @ direction_ND.T
            cosine_bN.diagonal(block.start).fill_(-torch.inf)
            nearest_bK = cosine_bN.sort(dim=1, descending=True, stable=True).indices[:, : len(rank_K)]
            self.level_NN[block].scatter_(1, nearest_bK, level_K.expand(len(nearest_bK), -1))

    @cached_property
    def _chances(self) -> list[float]:
        latents = len(self.level_NN)
        held = torch.zeros(len(self.fractions) + 1, dtype=torch.int64, device=self.level_NN.device)
        for block in blocks_of(latents):
            either_bN = torch.minimum(self.level_NN[block], self.level_NN[:, block].T)
            held += torch.bincount(either_bN.flatten(), minlength=len(held))
        return cast("list[float]", (held[:-1].cumsum(dim=0) / (latents * (latents - 1))).tolist())

    def chance(self, fraction: float) -> float:
        """Share of all pairs that the union of row and column holds."""
        return self._chances[self.fractions.index(fraction)]

    def holds(self, pair_P2: torch.Tensor, fraction: float) -> tuple[torch.Tensor, torch.Tensor]:
        """For pairs (i, j), bool [P] twice: whether j is in the top-K of i, and whether i is in that of j."""
        level, (i_P, j_P) = self.fractions.index(fraction), pair_P2.T
        return self.level_NN[i_P, j_P] <= level, self.level_NN[j_P, i_P] <= level

    def union(self, pair_P2: torch.Tensor, fraction: float) -> torch.Tensor:
        """bool [P]: whether either is in the top-K of the other."""
        row_P, column_P = self.holds(pair_P2, fraction)
        return row_P | column_P


class SimilarPairs:
    """The pairs that the penalty selects in a decoder: those of which one is among the k most similar latents of the other.

    k = max(1, int(topk (F - 1))), over all latents as in training, whether they fire or not. Of equal cosines at the edge,
    which training selects all, the lower indices are taken: whether cosines are equal depends on how they were rounded.
    """

    def __init__(self, near_FF: torch.Tensor):
        self.near_FF = near_FF
        """bool: which latents are in the top-K of each row's."""

    @classmethod
    def of(cls, W_dec_FD: torch.Tensor, topk: float) -> Self:
        """From decoder directions."""
        return cls(topk_mask(W_dec_FD, topk))

    def __or__(self, other: "SimilarPairs") -> "SimilarPairs":
        """The pairs that one or the other selects."""
        return SimilarPairs(self.near_FF | other.near_FF)

    def mask(self, block: slice) -> torch.Tensor:
        """bool [b, F]: which pairs of the block's latents and latents of a higher index are selected."""
        return (self.near_FF[block] | self.near_FF[:, block].T).triu_(block.start + 1)


class CrossTerms:
    """Sums of an SAE's cross terms over `pairs`, its own or another SAE's. Call `update` with every block of pairs."""

    def __init__(self, sae: SAE, pairs: SimilarPairs):
        self.sae, self.pairs = sae, pairs
        self.count = 0
        self.strength = torch.zeros((), dtype=torch.float64, device=sae.device)
        """Sum over pairs and rows of a_i a_j."""
        self.cross = torch.zeros((), dtype=torch.float64, device=sae.device)
        """Sum over pairs and rows of C_ij a_i a_j."""

    def update(self, block: PairBlock) -> None:
        """Take in a block of pairs."""
        mask_bF = self.pairs.mask(block.latents)
        self.count += int(mask_bF.sum())
        strength_bF = block.strength_bF * mask_bF
        self.strength += strength_bF.sum(dtype=torch.float64)
        strength_bF *= self.sae.W_dec_FD[block.latents] @ self.sae.W_dec_FD.T
        self.cross += strength_bF.sum(dtype=torch.float64)
