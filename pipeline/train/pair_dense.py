"""The contrastive penalty by dense matrix products over all pairs of latents.

Local shapes: b and c latents on the two sides of a block.
"""

import itertools
from collections.abc import Iterator

import torch

from pipeline.runtime.devices import block_rows
from pipeline.train.pair_selection import SMALL, SelectedPairs
from pipeline.train.penalty import Accumulator
from pipeline.train.weights import operand

TALL, WIDE = 576, 1152
"""On a CPU, most latents on the two sides of the blocks that are not on the diagonal: bounds the memory. Half of a block on
the diagonal is thrown away; below SMALL latents, blocks multiply slower."""
GPU_DIAGONAL = 2
"""Blocks on the diagonal on a GPU: with the one beside them they are 3/4 of F x F. More blocks mean more launches."""


def by_blocks(pairs: SelectedPairs, into: Accumulator | None) -> torch.Tensor:
    """sum_j M_ij D_ij G_ij [F] from the upper triangle of F x F, block by block."""
    strength_F = torch.zeros_like(pairs.norm_F)
    # Rounded as a whole: converting columns block by block is several times slower. Rows of W_dec convert fast.
    f_BF = operand("f", pairs.f_BF, pairs.config.precision)
    for tall, wide in _upper_triangle(0, len(pairs.W_dec_FD), _sizes(pairs)):
        _block(pairs, f_BF, tall, wide, into, strength_F)
    return strength_F


def _sizes(pairs: SelectedPairs) -> tuple[int, int, int]:
    """Most latents on a side of a block on the diagonal, and on the two sides of the others."""
    if pairs.f_BF.device.type == "cpu":
        return SMALL, TALL, WIDE
    latents = len(pairs.W_dec_FD)
    return -(-latents // GPU_DIAGONAL), block_rows(latents // 2), latents


def _upper_triangle(start: int, stop: int, sizes: tuple[int, int, int]) -> Iterator[tuple[slice, slice]]:
    """Blocks that cover the upper triangle: one square and two triangles of half the size, recursively."""
    smallest, most_tall, most_wide = sizes
    if stop - start <= smallest:
        yield slice(start, stop), slice(start, stop)
        return
    middle = (start + stop) // 2
    yield from _upper_triangle(start, middle, sizes)
    for tall in _parts(start, middle, most_tall):
        for wide in _parts(middle, stop, most_wide):
            yield tall, wide
    yield from _upper_triangle(middle, stop, sizes)


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
    mask_bc = pairs.mask(dot_bc, tall, wide)
    if tall == wide:
        mask_bc = mask_bc.triu(1)
    joint_bc = _joint(pairs, dot_bc, f_Bb, f_Bc, tall, wide)
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


def _joint(
    pairs: SelectedPairs, dot_bc: torch.Tensor, f_Bb: torch.Tensor, f_Bc: torch.Tensor, tall: slice, wide: slice
) -> torch.Tensor:
    """G_ij of a block of pairs: how strongly they fire together; in the unweighted penalty what takes its place."""
    if pairs.config.weighted:
        return torch.mm(f_Bb.T, f_Bc).to(dot_bc.dtype).mul_(1 / len(f_Bb))
    norms_bc = pairs.norm_F[tall, None] * pairs.norm_F[wide]
    return pairs.similarity(torch.ones_like(dot_bc), norms_bc).div_(len(pairs.W_dec_FD))


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total.add_(torch.mm(left, right))


def by_panels(pairs: SelectedPairs, into: Accumulator | None) -> torch.Tensor:
    """The same from all of F x F, as many rows of it at once as a GPU has memory for.

    Twice the multiplications of `by_blocks` in a hundredth of its kernels, and nothing that the host waits for.
    """
    latents, rows = len(pairs.W_dec_FD), len(pairs.f_BF)
    strength_F = torch.zeros_like(pairs.norm_F)
    f_BF, W_FD = operand("f", pairs.f_BF, pairs.config.precision), pairs.operand(pairs.W_dec_FD)
    size, everything = block_rows(latents), slice(0, latents)
    for start in range(0, latents, size):
        panel = slice(start, min(start + size, latents))
        dot_bF = torch.mm(pairs.W_dec_FD[panel], pairs.W_dec_FD.T)
        mask_bF = pairs.mask(dot_bF, panel, everything)
        joint_bF = _joint(pairs, dot_bF, f_BF[:, panel], f_BF, panel, everything)
        dot_bF *= mask_bF
        torch.sum(dot_bF * joint_bF, dim=1, out=strength_F[panel])
        if into is None:
            continue
        joint_bF *= mask_bF
        _add_product(into.W_dec_FD[panel], pairs.operand(joint_bF.mul_(into.weight)), W_FD)
        if pairs.config.weighted:
            _add_product(into.f_BF[:, panel], f_BF, pairs.operand(dot_bF.mul_(into.weight / rows)).T)
    return strength_F
