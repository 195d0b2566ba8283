"""The contrastive penalty and its gradient in closed form, without a matrix of F x F (docs/method.md, "Kernels").

With G = f^T f / B, dot products D = W W^T and the mask M, the weighted penalty is 1/2 sum_ij M_ij D_ij G_ij, by direction as
by magnitude, since C_ij a_i a_j = D_ij f_i f_j. What differs is how pairs are selected, and that the directional gradient
loses its part along each row, which is (sum_j M_ij D_ij G_ij) w_i / ||w_i||^2.

Shapes: B rows, D d_in, F d_sae, T and J latents of a block, N latents taken of each row.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pipeline.section import Dtype
from pipeline.study.recipe import Contrast
from pipeline.train.weights import factor

SMALL = 192
"""Latents of the blocks on the diagonal, half of which is thrown away; smaller ones multiply slower."""
TALL, WIDE = 576, 1152
"""Latents on the sides of the other blocks at most: bounds the memory."""
GATHERED = 1_000_000
"""Numbers gathered at once, 4 MB: bounds the memory, and is what a cache holds."""
MOVED = 64
"""Moving a decoder row in memory costs as much as multiplying it with this many others."""


@dataclass(frozen=True, kw_only=True)
class Latents:
    """What the penalty is a function of."""

    f_BF: torch.Tensor
    firing_B: torch.Tensor
    """Number of latents that fire on each row."""
    W_dec_FD: torch.Tensor
    norm_F: torch.Tensor
    """Norms of the decoder rows."""
    threshold_F: torch.Tensor
    """Similarity from which on a pair counts, by either of its latents."""
    config: Contrast

    def similarity(self, dot: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        """Similarities of pairs with these dot products and products of norms."""
        return dot / norms if self.config.by == "direction" else dot

    def selected(self, similarity: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """Weight of each unordered pair in the penalty, given the thresholds of its latents: false, true, or one half.

        Selecting by row selects a pair once for each of its latents that has it in its top K; the penalty is symmetric.
        """
        if self.config.select == "union":
            return similarity >= torch.minimum(one, other)
        if self.config.select == "mutual":
            return similarity >= torch.maximum(one, other)
        return ((similarity >= one).to(similarity.dtype) + (similarity >= other)) / 2


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Where `weight` times the gradient of the penalty is added."""

    f_BF: torch.Tensor
    W_dec_FD: torch.Tensor
    weight: float
    precision: Dtype
    """Of the products with latents and decoder rows; dot products, and so the mask, keep the dtype of the weights."""

    def factor(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as a factor of such a product."""
        return tensor.bfloat16() if self.precision == "bfloat16" else tensor


def thresholds(W_dec_FD: torch.Tensor, norm_F: torch.Tensor, config: Contrast) -> tuple[torch.Tensor, torch.Tensor]:
    """Per latent, [F] each: the k-th largest similarity to another latent, k = max(1, int(K (F - 1))), and the largest.

    The k-th are lowered by what the same product may differ by when another kernel rounds it: the pair that sits on the
    threshold is in the mask by definition.
    """
    latents = len(W_dec_FD)
    k = max(1, int(config.topk * (latents - 1)))
    threshold_F, largest_F = torch.empty_like(norm_F), torch.empty_like(norm_F)
    for start in range(0, latents, SMALL):
        panel = slice(start, start + SMALL)
        similarity_TF = torch.mm(W_dec_FD[panel], W_dec_FD.T)
        if config.by == "direction":
            similarity_TF /= norm_F[panel, None] * norm_F
        similarity_TF.diagonal(offset=start).fill_(-torch.inf)
        top_TK = similarity_TF.topk(k, dim=1, sorted=False).values
        torch.amin(top_TK, dim=1, out=threshold_F[panel])
        torch.amax(top_TK, dim=1, out=largest_F[panel])
    rounding = 8 * torch.finfo(norm_F.dtype).eps
    threshold_F -= rounding if config.by == "direction" else rounding * norm_F * norm_F.max()
    # Every pair means every pair, also when the thresholds are some steps old.
    return (threshold_F if k < latents - 1 else threshold_F.fill_(-torch.inf)), largest_F


def contrastive(latents: Latents, gradients: Gradients | None) -> torch.Tensor:
    """The penalty on a batch; adds its gradient unless there is nowhere to add it."""
    strength_F = (by_rows if _few_fire(latents) else by_blocks)(latents, gradients)
    if gradients and latents.config.by == "direction":
        radial_F = strength_F / latents.norm_F.square()
        gradients.W_dec_FD.addcmul_(latents.W_dec_FD, radial_F[:, None], value=-gradients.weight)
    return strength_F.sum() / 2


def _few_fire(latents: Latents) -> bool:
    """Whether the pairs that fire together on some row cost less than all pairs, by the number of multiplications."""
    if not latents.config.weighted:
        return False
    rows, d_sae = latents.f_BF.shape
    d_in = latents.W_dec_FD.shape[1]
    firing_B = latents.firing_B.double()
    return 2 * d_in * float((firing_B * (firing_B + MOVED)).sum()) < 1.5 * d_sae**2 * (rows + d_in)


def by_blocks(latents: Latents, gradients: Gradients | None) -> torch.Tensor:
    """sum_j M_ij D_ij G_ij [F] from the upper triangle of F x F, block by block."""
    strength_F = torch.zeros_like(latents.norm_F)
    # Rounded as a whole, since columns are several times slower to convert; rows of W_dec are not.
    f_BF = factor("f", latents.f_BF, gradients.precision if gradients else "float32")
    for tall, wide in _upper_triangle(0, len(latents.W_dec_FD)):
        _block(latents, f_BF, tall, wide, gradients, strength_F)
    return strength_F


def _upper_triangle(start: int, stop: int) -> Iterator[tuple[slice, slice]]:
    """Blocks that cover it: a square and two triangles of half the size, and so on."""
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
    """As few parts as may be of at most so many, of sizes that differ by one at most."""
    count = -(-(stop - start) // most)
    edges = [start + (stop - start) * index // count for index in range(count + 1)]
    return [slice(*ends) for ends in itertools.pairwise(edges)]


def _block(
    latents: Latents,
    f_BF: torch.Tensor,
    tall: slice,
    wide: slice,
    gradients: Gradients | None,
    strength_F: torch.Tensor,
) -> None:
    W_TD, W_JD, f_BT, f_BJ = latents.W_dec_FD[tall], latents.W_dec_FD[wide], f_BF[:, tall], f_BF[:, wide]
    rows = len(f_BF)
    dot_TJ = torch.mm(W_TD, W_JD.T)
    mask_TJ = _mask(latents, dot_TJ, tall, wide)
    if latents.config.weighted:
        joint_TJ = torch.mm(f_BT.T, f_BJ).to(dot_TJ.dtype).mul_(1 / rows)
    else:
        norms_TJ = latents.norm_F[tall, None] * latents.norm_F[wide]
        joint_TJ = latents.similarity(torch.ones_like(dot_TJ), norms_TJ).div_(len(latents.W_dec_FD))
    joint_TJ *= mask_TJ
    strength_TJ = dot_TJ * joint_TJ
    strength_F[tall] += strength_TJ.sum(dim=1)
    strength_F[wide] += strength_TJ.sum(dim=0)
    del strength_TJ  # keeps the peak of memory down
    if gradients is None:
        return
    joint = gradients.factor(joint_TJ.mul_(gradients.weight))
    _add_product(gradients.W_dec_FD[tall], joint, gradients.factor(W_JD))
    _add_product(gradients.W_dec_FD[wide], joint.T, gradients.factor(W_TD))
    if latents.config.weighted:
        dot = gradients.factor(dot_TJ.mul_(mask_TJ).mul_(gradients.weight / rows))
        _add_product(gradients.f_BF[:, tall], f_BJ, dot.T)
        _add_product(gradients.f_BF[:, wide], f_BT, dot)


def _mask(latents: Latents, dot_TJ: torch.Tensor, tall: slice, wide: slice) -> torch.Tensor:
    similarity_TJ = latents.similarity(dot_TJ, latents.norm_F[tall, None] * latents.norm_F[wide])
    mask_TJ = latents.selected(similarity_TJ, latents.threshold_F[tall, None], latents.threshold_F[wide])
    return mask_TJ.triu(1) if tall == wide else mask_TJ


def _add_product(total: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> None:
    if one.dtype == total.dtype:
        total.addmm_(one, other)
    else:
        total.add_(torch.mm(one, other))


def by_rows(latents: Latents, gradients: Gradients | None) -> torch.Tensor:
    """sum_j M_ij D_ij G_ij [F] from the latents that fire on each row, some rows at a time. The penalty must be weighted."""
    strength_F = torch.zeros_like(latents.norm_F)
    firing_B, order_B = latents.firing_B.sort()
    firing = firing_B.long().tolist()
    stop = len(firing)
    # From the rows on which most fire, so that those of a chunk have about as many.
    while stop and firing[stop - 1] > 1:
        most = firing[stop - 1]
        start = max(0, stop - max(1, GATHERED // (most * latents.W_dec_FD.shape[1])))
        _rows(latents, gradients, order_B[start:stop], most, strength_F)
        stop = start
    return strength_F


def _rows(latents: Latents, gradients: Gradients | None, rows_B: torch.Tensor, most: int, strength_F: torch.Tensor) -> None:
    W_FD = latents.W_dec_FD
    # Rows on which fewer than `most` fire get some silent latents too, whose products are all zero.
    f_BN, index_BN = latents.f_BF[rows_B].topk(most, dim=1, sorted=False)
    norm_BN, threshold_BN = latents.norm_F[index_BN], latents.threshold_F[index_BN]
    W_BND = W_FD[index_BN]
    dot_BNN = torch.bmm(W_BND, W_BND.mT)
    similarity_BNN = latents.similarity(dot_BNN, norm_BN[:, :, None] * norm_BN[:, None])
    mask_BNN = latents.selected(similarity_BNN, threshold_BN[:, :, None], threshold_BN[:, None])
    mask_BNN.diagonal(dim1=1, dim2=2).zero_()
    dot_BNN *= mask_BNN
    f_gradient_BN = torch.bmm(dot_BNN, f_BN[:, :, None]).squeeze(2) / len(latents.f_BF)
    strength_F.index_add_(0, index_BN.flatten(), (f_gradient_BN * f_BN).flatten())
    if gradients is None:
        return
    scaled_BN = f_BN * (gradients.weight / len(latents.f_BF))
    joint_BNN = mask_BNN * (scaled_BN[:, :, None] * f_BN[:, None])
    W_gradient_BND = torch.bmm(gradients.factor(joint_BNN), gradients.factor(W_BND)).to(W_FD.dtype)
    gradients.W_dec_FD.index_add_(0, index_BN.flatten(), W_gradient_BND.flatten(0, 1))
    gradients.f_BF[rows_B[:, None], index_BN] += gradients.weight * f_gradient_BN
