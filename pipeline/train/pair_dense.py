"""The contrastive penalty by dense matrix products over all pairs of latents.

Local shapes: b and c latents on the two sides of a block.
"""

import itertools
import math
from collections.abc import Iterator

import torch

from pipeline.runtime.compiled import compiled
from pipeline.runtime.devices import PANEL_BYTES
from pipeline.train.pair_selection import SMALL, SelectedPairs, pair_weights
from pipeline.train.penalty import Accumulator
from pipeline.train.weights import operand

TALL, WIDE = 576, 1152
"""On a CPU, most latents on the two sides of the blocks that are not on the diagonal: bounds the memory. Half of a block on
the diagonal is thrown away; below SMALL latents, blocks multiply slower."""
HALVED, GPU_DIAGONAL = 8192, 4
"""Latents from which on a GPU takes 5/8 of F x F instead of all of it: so many blocks on the diagonal, and those above."""


def by_blocks(pairs: SelectedPairs, into: Accumulator | None) -> torch.Tensor:
    """sum_j M_ij D_ij G_ij [F] from the upper triangle of F x F, block by block."""
    strength_F = torch.zeros_like(pairs.norm_F)
    # Rounded as a whole: converting columns block by block is several times slower. Rows of W_dec convert fast.
    f_BF = operand("f", pairs.f_BF, pairs.config.precision)
    for tall, wide in _upper_triangle(0, len(pairs.W_dec_FD), (SMALL, TALL, WIDE)):
        _block(pairs, f_BF, tall, wide, into, strength_F)
    return strength_F


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


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor, weight: float = 1.0) -> None:
    if left.dtype == total.dtype:
        total.addmm_(left, right, alpha=weight)
    else:
        total.add_(torch.mm(left, right), alpha=weight)


def gpu_block(latents: int) -> int:
    """Latents on each side of a block on a GPU."""
    return latents if latents < HALVED else min(-(-latents // GPU_DIAGONAL), math.isqrt(PANEL_BYTES // 4))


def by_squares(pairs: SelectedPairs, into: Accumulator | None) -> torch.Tensor:
    """The same on a GPU: large blocks, in full on the diagonal. Nothing that the host waits for."""
    latents, rows, config = len(pairs.W_dec_FD), len(pairs.f_BF), pairs.config
    f_BF = pairs.operand(pairs.f_BF)
    rounded_FD = pairs.rounded_FD
    if rounded_FD is None or rounded_FD.dtype != f_BF.dtype:
        rounded_FD = pairs.operand(pairs.W_dec_FD)
    operands = f_BF, rounded_FD
    kind = config.by, config.select, f_BF.dtype
    strength_F = torch.zeros_like(pairs.norm_F)
    size = gpu_block(latents)
    for tall, wide in _upper_triangle(0, latents, (size, size, size)):
        dot_bc = torch.mm(pairs.W_dec_FD[tall], pairs.W_dec_FD[wide].T)
        joint_bc = torch.mm(f_BF[:, tall].T, f_BF[:, wide]) if config.weighted else None
        norms, thresholds = ((values[tall], values[wide]) for values in (pairs.norm_F, pairs.threshold_F))
        scale = 1 / rows if config.weighted else 1 / latents
        selected = _selected(dot_bc, joint_bc, norms, thresholds, kind, scale, tall == wide)
        dot_bc, joint_bc, strength_b, strength_c = selected
        strength_F[tall] += strength_b
        if strength_c is not None:
            strength_F[wide] += strength_c
        if into:
            _spread(into, operands, (tall, wide), dot_bc if config.weighted else None, joint_bc)
            if tall != wide:
                _spread(into, operands, (wide, tall), dot_bc.T if config.weighted else None, joint_bc.T)
    return strength_F


def _spread(
    into: Accumulator,
    operands: tuple[torch.Tensor, torch.Tensor],
    sides: tuple[slice, slice],
    dot_bc: torch.Tensor | None,
    joint_bc: torch.Tensor,
) -> None:
    """Add the gradient of a block of pairs to the latents of its first side."""
    (f_BF, W_FD), (one, other) = operands, sides
    _add_product(into.W_dec_FD[one], joint_bc, W_FD[other], into.weight)
    if dot_bc is not None:
        _add_product(into.f_BF[:, one], f_BF[:, other], dot_bc.T, into.weight / len(f_BF))


@compiled
def _selected(
    dot_bc: torch.Tensor,
    joint_bc: torch.Tensor | None,
    norms: tuple[torch.Tensor, torch.Tensor],
    thresholds: tuple[torch.Tensor, torch.Tensor],
    kind: tuple[str, str, torch.dtype],
    scale: float,
    diagonal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """M o D and M o G of a block in the dtype of products; sums of M o D o G over each side, on the diagonal only one."""
    by, select, dtype = kind
    norms_bc = norms[0][:, None] * norms[1]
    similarity_bc = dot_bc / norms_bc if by == "direction" else dot_bc
    mask_bc = pair_weights(similarity_bc, thresholds[0][:, None], thresholds[1], select)
    if diagonal:
        index_b = torch.arange(len(dot_bc), device=dot_bc.device)
        mask_bc = mask_bc * (index_b[:, None] != index_b)
    if joint_bc is not None:
        joint_bc = joint_bc.to(dot_bc.dtype) * scale
    else:
        joint_bc = scale / norms_bc if by == "direction" else torch.full_like(dot_bc, scale)
    selected_bc = joint_bc * mask_bc
    strength_bc = dot_bc * selected_bc
    strength_c = None if diagonal else strength_bc.sum(dim=0)
    return (dot_bc * mask_bc).to(dtype), selected_bc.to(dtype), strength_bc.sum(dim=1), strength_c
