"""How much of a reconstruction is cross terms of latents that point the same way (docs/method.md, "Interference").

Shapes: D d_in, F d_sae, b latents of a block.
"""

from typing import Any

import torch

from pipeline.evaluate.pairs import PairBlock, blocks_of
from pipeline.sae.sae import SAE

ROUNDING = 1e-6
"""Two blocks may round the same cosine differently; thresholds are lowered by this, lest a pair miss its own."""


class SimilarPairs:
    """The pairs that the penalty selects in a decoder: C_ij >= min(t_i, t_j), t_i the k-th largest cosine of row i.

    k = max(1, int(topk (F - 1))), over all latents as in training, whether they fire or not.
    """

    def __init__(self, W_dec_FD: torch.Tensor, topk: float):
        self.W_dec_FD = W_dec_FD
        k = max(1, int(topk * (len(W_dec_FD) - 1)))
        thresholds = []
        for block in blocks_of(len(W_dec_FD)):
            cosine_bF = W_dec_FD[block] @ W_dec_FD.T
            cosine_bF.diagonal(block.start).fill_(-torch.inf)
            thresholds.append(cosine_bF.topk(k, dim=1).values[:, -1])
        self.threshold_F = torch.cat(thresholds) - ROUNDING

    def mask(self, block: slice) -> torch.Tensor:
        """bool [b, F]: which pairs of these latents and higher ones are selected."""
        cosine_bF = self.W_dec_FD[block] @ self.W_dec_FD.T
        threshold_bF = torch.minimum(self.threshold_F[block, None], self.threshold_F)
        return (cosine_bF >= threshold_bF).triu_(block.start + 1)


class Interference:
    """Sums over the pairs of one set. `update` with every block of pairs, then `compute`."""

    def __init__(self, sae: SAE, pairs: SimilarPairs):
        self.sae, self.pairs = sae, pairs
        self.count = 0
        self.cross = torch.zeros((), dtype=torch.float64)
        self.together = torch.zeros((), dtype=torch.float64)

    def update(self, block: PairBlock) -> None:
        """Take in a block of pairs."""
        mask_bF = self.pairs.mask(block.latents)
        self.count += int(mask_bF.sum())
        strength_bF = block.strength_bF * mask_bF
        self.together += strength_bF.sum(dtype=torch.float64)
        strength_bF *= self.sae.W_dec_FD[block.latents] @ self.sae.W_dec_FD.T
        self.cross += strength_bF.sum(dtype=torch.float64)

    def compute(self, reconstructed: float) -> dict[str, Any]:
        """Both relative to `reconstructed`, the sum over rows of ||x^ - b_dec||^2, which contains 2 sum_{i<j} C_ij a_i a_j.

        interference: 2 sum_P C_ij a_i a_j, the share of it that is cross terms of the set. co_activation: the same without
        the cosines. None where nothing is reconstructed.
        """
        return {
            "pairs": self.count,
            "interference": 2 * float(self.cross) / reconstructed if reconstructed else None,
            "co_activation": 2 * float(self.together) / reconstructed if reconstructed else None,
        }


def same_direction(W_dec_FD: torch.Tensor, other_FD: torch.Tensor) -> float:
    """Mean cosine of the latents of two SAEs that have the same index: how far an index still means the same latent."""
    return float((W_dec_FD * other_FD).sum(dim=1).mean())
