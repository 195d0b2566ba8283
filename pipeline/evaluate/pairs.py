"""Statistics of pairs of latents, a block of latents at a time: never a matrix of all pairs in float.

Shapes: B rows, D d_in, F d_sae, b latents of a block, P pairs.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from pipeline.sae.sae import SAE

BLOCK_BYTES = 64 * 2**20
"""Of each float32 matrix [b, F]: of 16,384 latents, 1,024 are a block; up to 4,096 latents are one."""

Rows = Callable[[], Iterable[torch.Tensor]]
"""Makes a new iterator over the held-out rows, [B, D] at a time."""


@dataclass(frozen=True)
class PairBlock:
    """How often and how strongly some latents fire together with each latent that is numbered higher."""

    first: int
    """The block is the latents `first` to `first + b`."""
    joint_bF: torch.Tensor
    """Rows on which both fire."""
    strength_bF: torch.Tensor
    """Sum over rows of the product of their strengths; with unit decoder rows a latent is its own strength."""

    @property
    def latents(self) -> slice:
        """The block's own latents."""
        return slice(self.first, self.first + len(self.joint_bF))


def blocks_of(latents: int) -> list[slice]:
    """Latents in blocks of which a row of pairs each takes BLOCK_BYTES together."""
    size = max(1, BLOCK_BYTES // (4 * max(1, latents)))
    return [slice(first, min(first + size, latents)) for first in range(0, latents, size)]


def pair_blocks(sae: SAE, rows: Rows) -> Iterator[PairBlock]:
    """Every unordered pair once, with one pass over the rows for each block. Pairs (i, j) with j <= i are 0."""
    for block in blocks_of(sae.d_sae):
        joint_bF = torch.zeros(block.stop - block.start, sae.d_sae)
        strength_bF = torch.zeros_like(joint_bF)
        for x_BD in rows():
            f_BF = sae.encode(x_BD)
            strength_bF.addmm_(f_BF[:, block].T, f_BF)
            fired_BF = (f_BF > 0).float()
            joint_bF.addmm_(fired_BF[:, block].T, fired_BF)  # exact: float32 counts to 2^24 rows
        yield PairBlock(block.start, joint_bF.triu_(block.start + 1), strength_bF.triu_(block.start + 1))


def firings(sae: SAE, rows: Rows) -> torch.Tensor:
    """int64 [F]: rows on which each latent fires."""
    fired_F = torch.zeros(sae.d_sae, dtype=torch.int64)
    for x_BD in rows():
        fired_F += (sae.encode(x_BD) > 0).sum(dim=0)
    return fired_F


class TopPairs:
    """The pairs of largest score among those offered, largest first, ties to the lower indices."""

    def __init__(self, size: int):
        self.size = size
        self.pair_P2 = torch.zeros(0, 2, dtype=torch.int64)
        self.score_P = torch.zeros(0)
        self.strength_P = torch.zeros(0)

    def offer(self, block: PairBlock, score_bF: torch.Tensor) -> None:
        """Take in the pairs of a block, later blocks after earlier ones. A pair of score -inf is none."""
        largest = score_bF.flatten().topk(min(self.size, score_bF.numel())).values
        # Of equal scores topk keeps any, so the ties with its last are all let in and sorted out below.
        row_P, column_P = ((score_bF >= largest[-1]) & (score_bF > -torch.inf)).nonzero(as_tuple=True)
        pair_P2 = torch.cat([self.pair_P2, torch.stack([row_P + block.first, column_P], dim=1)])
        score_P = torch.cat([self.score_P, score_bF[row_P, column_P]])
        strength_P = torch.cat([self.strength_P, block.strength_bF[row_P, column_P]])
        kept = score_P.sort(descending=True, stable=True).indices[: self.size]
        self.pair_P2, self.score_P, self.strength_P = pair_P2[kept], score_P[kept], strength_P[kept]

    def __len__(self) -> int:
        return len(self.pair_P2)


@dataclass(frozen=True, kw_only=True)
class Together:
    """Which latents live, and which pairs of them fire together most."""

    live: torch.Tensor
    """int64 [n]: indices of the latents that fire often enough."""
    by_strength: TopPairs
    by_phi: TopPairs


def fire_together(
    blocks: Iterable[PairBlock], fired_F: torch.Tensor, rows: int, *, live_firings: int, joint_firings: int, most: float
) -> Together:
    """The pairs of live latents that fire together on `joint_firings` rows or more, at most `most` n of them by each score.

    By mean product of strengths, and by the phi coefficient of firing: (p_ij - p_i p_j) / sqrt(p_i q_i p_j q_j).
    """
    live_F = fired_F >= live_firings
    live = live_F.nonzero().squeeze(1)
    size = max(1, round(most * len(live)))
    by_strength, by_phi = TopPairs(size), TopPairs(size)
    p_F = fired_F.double() / rows
    variance_F = p_F * (1 - p_F)
    for block in blocks:
        out_bF = block.joint_bF < joint_firings
        out_bF |= ~(live_F[block.latents, None] & live_F)
        by_strength.offer(block, block.strength_bF.masked_fill(out_bF, -torch.inf))
        # Doubles, and one operation at a time: a fused one rounds differently at the edge of a block, and equal phis would
        # be ranked by where they stand in it.
        phi_bF = block.joint_bF.double() / rows
        phi_bF -= p_F[block.latents, None] * p_F
        phi_bF /= (variance_F[block.latents, None] * variance_F).sqrt_()
        # A latent that fires on every row has no phi with anything.
        by_phi.offer(block, phi_bF.masked_fill_(out_bF | ~phi_bF.isfinite(), -torch.inf))
    return Together(live=live, by_strength=by_strength, by_phi=by_phi)
