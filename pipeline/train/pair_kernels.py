"""The contrastive penalty and its gradient in closed form, without a matrix of F x F (docs/method.md, "Kernels").

With G = f^T f / B, dot products D = W W^T and the mask M, the weighted penalty is 1/2 sum_ij M_ij D_ij G_ij, both by
direction and by magnitude, since C_ij a_i a_j = D_ij f_i f_j. The two differ in which pairs they select. By direction, the
gradient also loses its component along each row, (sum_j M_ij D_ij G_ij) w_i / ||w_i||^2.

Local shapes: b and c latents on the two sides of a block, k latents taken from each row.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pipeline.study.penalties import Contrast
from pipeline.train.penalty import Accumulator, Latents
from pipeline.train.weights import operand

SMALL = 192
"""Latents on a side of the blocks on the diagonal. Half of such a block is thrown away; smaller blocks multiply slower."""
TALL, WIDE = 576, 1152
"""Most latents on the two sides of the other blocks: bounds the memory."""
GATHERED = 1_000_000
"""Numbers gathered at once: 4 MB bound the memory and fit a cache."""
MOVED = 64
"""Copying a decoder row costs as much as multiplying it with this many others."""


@dataclass(frozen=True, kw_only=True)
class SelectedPairs(Latents):
    """The latents of a batch, and the thresholds that select the pairs under the penalty."""

    threshold_F: torch.Tensor
    """Per latent, the similarity to another at which their pair is selected."""
    config: Contrast

    def similarity(self, dot: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """Similarities of pairs, given their dot products and products of norms."""
        return dot / norms if self.config.by == "direction" else dot

    def selected(self, similarity: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """Weight of each unordered pair in the penalty, given the thresholds of its two latents: false, true or one half.

        `row` selects a pair once for each of its latents that has the other in its top K.
        """
        if self.config.select == "union":
            return similarity >= torch.minimum(first, second)
        if self.config.select == "mutual":
            return similarity >= torch.maximum(first, second)
        return ((similarity >= first).to(similarity.dtype) + (similarity >= second)) / 2

    def operand(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as an operand of products with latents or decoder rows. Products that select pairs stay exact."""
        return tensor.bfloat16() if self.config.precision == "bfloat16" else tensor


def thresholds(W_dec_FD: torch.Tensor, norm_F: torch.Tensor, config: Contrast) -> tuple[torch.Tensor, torch.Tensor]:
    """Per latent, [F] each: the k-th largest similarity to another latent, k = max(1, int(K (F - 1))), and the largest.

    Thresholds get a rounding tolerance, so that the k-th pair stays selected whichever kernel computes it.
    """
    latents = len(W_dec_FD)
    k = max(1, int(config.topk * (latents - 1)))
    threshold_F, largest_F = torch.empty_like(norm_F), torch.empty_like(norm_F)
    for start in range(0, latents, SMALL):
        panel = slice(start, start + SMALL)
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


def penalty(pairs: SelectedPairs, into: Accumulator | None) -> torch.Tensor:
    """The penalty on a batch. Adds its gradient to `into` if that is given."""
    strength_F = (by_rows if few_fire(pairs) else by_blocks)(pairs, into)
    if into and pairs.config.by == "direction":
        radial_F = strength_F / pairs.norm_F.square()
        into.W_dec_FD.addcmul_(pairs.W_dec_FD, radial_F[:, None], value=-into.weight)
    return strength_F.sum() / 2


def few_fire(pairs: SelectedPairs) -> bool:
    """True if going through the latents that fire on each row takes fewer multiplications than going through all pairs."""
    if not pairs.config.weighted:
        return False
    rows, d_sae = pairs.f_BF.shape
    d_in = pairs.W_dec_FD.shape[1]
    firing_B = pairs.firing_B.double()
    return 2 * d_in * float((firing_B * (firing_B + MOVED)).sum()) < 1.5 * d_sae**2 * (rows + d_in)


def by_blocks(pairs: SelectedPairs, into: Accumulator | None) -> torch.Tensor:
    """sum_j M_ij D_ij G_ij [F] from the upper triangle of F x F, block by block."""
    strength_F = torch.zeros_like(pairs.norm_F)
    # Rounded as a whole: converting columns block by block is several times slower. Rows of W_dec convert fast.
    f_BF = operand("f", pairs.f_BF, pairs.config.precision)
    for tall, wide in _upper_triangle(0, len(pairs.W_dec_FD)):
        _block(pairs, f_BF, tall, wide, into, strength_F)
    return strength_F


def _upper_triangle(start: int, stop: int) -> Iterator[tuple[slice, slice]]:
    """Blocks that cover the upper triangle: one square and two triangles of half the size, recursively."""
    if stop - start <= SMALL:
        yield slice(start, stop), slice(start, stop)
        return
    middle = (start + stop) // 2
    yield from _upper_triangle(start, middle)
    for tall in _parts(start, middle, TALL):
        for wide in _parts(middle, stop, WIDE):
            yield tall, wide
    yield from _upper_triangle(middle, stop)


def _parts(start: int, stop: int, most: int) -> list[slice]:
    """The fewest parts of at most `most` each, with sizes that differ by at most one."""
    count = -(-(stop - start) // most)
    edges = [start + (stop - start) * index // count for index in range(count + 1)]
    return [slice(*ends) for ends in itertools.pairwise(edges)]


def _block(
    pairs: SelectedPairs,
    f_BF: torch.Tensor,
    tall: slice,
    wide: slice,
    into: Accumulator | None,
    strength_F: torch.Tensor,
) -> None:
    W_bD, W_cD, f_Bb, f_Bc = pairs.W_dec_FD[tall], pairs.W_dec_FD[wide], f_BF[:, tall], f_BF[:, wide]
    rows = len(f_BF)
    dot_bc = torch.mm(W_bD, W_cD.T)
    mask_bc = _mask(pairs, dot_bc, tall, wide)
    if pairs.config.weighted:
        joint_bc = torch.mm(f_Bb.T, f_Bc).to(dot_bc.dtype).mul_(1 / rows)
    else:
        norms_bc = pairs.norm_F[tall, None] * pairs.norm_F[wide]
        joint_bc = pairs.similarity(torch.ones_like(dot_bc), norms_bc).div_(len(pairs.W_dec_FD))
    joint_bc *= mask_bc
    strength_bc = dot_bc * joint_bc
    strength_F[tall] += strength_bc.sum(dim=1)
    strength_F[wide] += strength_bc.sum(dim=0)
    del strength_bc  # lowers the peak memory
    if into is None:
        return
    joint = pairs.operand(joint_bc.mul_(into.weight))
    _add_product(into.W_dec_FD[tall], joint, pairs.operand(W_cD))
    _add_product(into.W_dec_FD[wide], joint.T, pairs.operand(W_bD))
    if pairs.config.weighted:
        dot = pairs.operand(dot_bc.mul_(mask_bc).mul_(into.weight / rows))
        _add_product(into.f_BF[:, tall], f_Bc, dot.T)
        _add_product(into.f_BF[:, wide], f_Bb, dot)


def _mask(pairs: SelectedPairs, dot_bc: torch.Tensor, tall: slice, wide: slice) -> torch.Tensor:
    similarity_bc = pairs.similarity(dot_bc, pairs.norm_F[tall, None] * pairs.norm_F[wide])
    mask_bc = pairs.selected(similarity_bc, pairs.threshold_F[tall, None], pairs.threshold_F[wide])
    return mask_bc.triu(1) if tall == wide else mask_bc


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right))


def by_rows(pairs: SelectedPairs, into: Accumulator | None) -> torch.Tensor:
    """sum_j M_ij D_ij G_ij [F] from the latents that fire on each row, a chunk of rows at a time. Weighted penalty only."""
    strength_F = torch.zeros_like(pairs.norm_F)
    firing_B, order_B = pairs.firing_B.sort()
    firing = [int(count) for count in firing_B]
    stop = len(firing)
    # Rows with the most firing latents first, so that the rows of a chunk have about equally many.
    while stop and firing[stop - 1] > 1:
        most = firing[stop - 1]
        start = max(0, stop - max(1, GATHERED // (most * pairs.W_dec_FD.shape[1])))
        _rows(pairs, into, order_B[start:stop], most, strength_F)
        stop = start
    return strength_F


def _rows(pairs: SelectedPairs, into: Accumulator | None, rows_B: torch.Tensor, most: int, strength_F: torch.Tensor) -> None:
    W_FD = pairs.W_dec_FD
    # Rows with fewer firing latents take some silent ones along, whose products are zero.
    f_Bk, index_Bk = pairs.f_BF[rows_B].topk(most, dim=1, sorted=False)
    norm_Bk, threshold_Bk = pairs.norm_F[index_Bk], pairs.threshold_F[index_Bk]
    W_BkD = W_FD[index_Bk]
    dot_Bkk = torch.bmm(W_BkD, W_BkD.mT)
    similarity_Bkk = pairs.similarity(dot_Bkk, norm_Bk[:, :, None] * norm_Bk[:, None])
    mask_Bkk = pairs.selected(similarity_Bkk, threshold_Bk[:, :, None], threshold_Bk[:, None])
    mask_Bkk.diagonal(dim1=1, dim2=2).zero_()
    dot_Bkk *= mask_Bkk
    f_gradient_Bk = torch.bmm(dot_Bkk, f_Bk[:, :, None]).squeeze(2) / len(pairs.f_BF)
    strength_F.index_add_(0, index_Bk.flatten(), (f_gradient_Bk * f_Bk).flatten())
    if into is None:
        return
    scaled_Bk = f_Bk * (into.weight / len(pairs.f_BF))
    joint_Bkk = mask_Bkk * (scaled_Bk[:, :, None] * f_Bk[:, None])
    W_gradient_BkD = torch.bmm(pairs.operand(joint_Bkk), pairs.operand(W_BkD)).to(W_FD.dtype)
    into.W_dec_FD.index_add_(0, index_Bk.flatten(), W_gradient_BkD.flatten(0, 1))
    into.f_BF[rows_B[:, None], index_Bk] += into.weight * f_gradient_Bk
