"""Selects the pairs of latents under the contrastive penalty: from thresholds that are kept from step to step.

Local shapes: b and c latents on the two sides of a block.
"""

from dataclasses import dataclass

import torch

from pipeline.runtime.devices import block_rows
from pipeline.study.penalties import Contrast
from pipeline.train.penalty import Latents

SMALL = 192
"""Latents whose similarities to all others are computed at once on a CPU: fits a cache."""


@dataclass(frozen=True, kw_only=True)
class SelectedPairs(Latents):
    """The latents of a batch, and the thresholds that select the pairs under the penalty."""

    threshold_F: torch.Tensor
    """Per latent, the similarity to another at which their pair is selected."""
    config: Contrast

    def similarity(self, dot: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """Similarities of pairs, given their dot products and products of norms."""
        return dot / norms if self.config.by == "direction" else dot

    def mask(self, dot_bc: torch.Tensor, tall: slice, wide: slice) -> torch.Tensor:
        """The weights of all pairs of two ranges of latents, given their dot products. None is a latent with itself."""
        similarity_bc = self.similarity(dot_bc, self.norm_F[tall, None] * self.norm_F[wide])
        mask_bc = pair_weights(similarity_bc, self.threshold_F[tall, None], self.threshold_F[wide], self.config.select)
        mask_bc.diagonal(offset=tall.start - wide.start).zero_()
        return mask_bc

    def operand(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as an operand of products with latents or decoder rows. Products that select pairs stay exact."""
        return tensor.bfloat16() if self.config.precision == "bfloat16" else tensor


def pair_weights(similarity: torch.Tensor, first: torch.Tensor, second: torch.Tensor, select: str) -> torch.Tensor:
    """Weight of each unordered pair in the penalty, given the thresholds of its two latents: false, true or one half.

    `row` selects a pair once for each of its latents that has the other in its top K.
    """
    if select == "union":
        return similarity >= torch.minimum(first, second)
    if select == "mutual":
        return similarity >= torch.maximum(first, second)
    return ((similarity >= first).to(similarity.dtype) + (similarity >= second)) / 2


def thresholds(W_dec_FD: torch.Tensor, norm_F: torch.Tensor, config: Contrast) -> tuple[torch.Tensor, torch.Tensor]:
    """Per latent, [F] each: the k-th largest similarity to another latent, k = max(1, int(K (F - 1))), and the largest.

    Thresholds get a rounding tolerance, so that the k-th pair stays selected whichever kernel computes it.
    """
    latents = len(W_dec_FD)
    k = max(1, int(config.topk * (latents - 1)))
    threshold_F, largest_F = torch.empty_like(norm_F), torch.empty_like(norm_F)
    size = SMALL if W_dec_FD.device.type == "cpu" else block_rows(latents)
    for start in range(0, latents, size):
        panel = slice(start, start + size)
        similarity_bF = torch.mm(W_dec_FD[panel], W_dec_FD.T)
        if config.by == "direction":
            similarity_bF /= norm_F[panel, None] * norm_F
        similarity_bF.diagonal(offset=start).fill_(-torch.inf)
        top_bk = similarity_bF.topk(k, dim=1, sorted=False).values
        torch.amin(top_bk, dim=1, out=threshold_F[panel])
        torch.amax(top_bk, dim=1, out=largest_F[panel])
    rounding = 8 * torch.finfo(norm_F.dtype).eps
    threshold_F -= rounding if config.by == "direction" else rounding * norm_F * norm_F.max()
    # topk = 1 selects all pairs, even with stale thresholds.
    return (threshold_F if k < latents - 1 else threshold_F.fill_(-torch.inf)), largest_F
