"""The contrastive penalty and its gradient in closed form (docs/method.md, "Kernels").

With G = f^T f / B, dot products D = W W^T and the mask M, the weighted penalty is 1/2 sum_ij M_ij D_ij G_ij, both by
direction and by magnitude, since C_ij a_i a_j = D_ij f_i f_j. The two differ in which pairs they select. By direction, the
gradient also loses its component along each row, (sum_j M_ij D_ij G_ij) w_i / ||w_i||^2.
"""

from collections.abc import Callable

import torch

from pipeline.train.pair_dense import by_blocks, by_squares
from pipeline.train.pair_firings import by_rows, by_table
from pipeline.train.pair_selection import SelectedPairs
from pipeline.train.penalty import Accumulator

Kernel = Callable[[SelectedPairs, Accumulator | None], torch.Tensor]
"""Returns sum_j M_ij D_ij G_ij [F], and adds the gradient to the accumulator, but for the part along each row."""

LARGEST_TABLE = 4096
"""Latents up to which a CPU thread holds matrices of F x F: three of 64 MB."""
GATHERED_ROW = 64
"""Copying a decoder row costs as much as multiplying it with this many others."""
GATHERED_PAIR = 170
"""Selecting a pair of firing latents costs as much as so many multiplications of a matrix product."""
SPARSE = 5
"""A multiplication with latents without their zeros costs as much as so many of a matrix product."""
TABLE_ENTRY = 90
"""The same for selecting a pair in a table, and for finding out whether a latent fires."""


def penalty(pairs: SelectedPairs, into: Accumulator | None) -> torch.Tensor:
    """The penalty on a batch. Adds its gradient to `into` if that is given."""
    strength_F = kernel_for(pairs)(pairs, into)
    if into and pairs.config.by == "direction":
        radial_F = strength_F / pairs.norm_F.square()
        if into.along_F is not None:
            into.along_F.sub_(radial_F, alpha=into.weight)
        else:
            into.W_dec_FD.addcmul_(pairs.W_dec_FD, radial_F[:, None], value=-into.weight)
    return strength_F.sum() / 2


def kernel_for(pairs: SelectedPairs) -> Kernel:
    """The cheapest kernel: on a CPU by counting multiplications. A GPU would have to be waited for to count them."""
    if pairs.f_BF.device.type != "cpu":
        return by_squares
    if not pairs.config.weighted:
        return by_blocks
    found = costs(pairs)
    return min(found, key=lambda kernel: found[kernel])


def costs(pairs: SelectedPairs) -> dict[Kernel, float]:
    """What every kernel for a CPU costs, in multiplications of a matrix product."""
    rows, d_sae = pairs.f_BF.shape
    d_in = pairs.W_dec_FD.shape[1]
    assert pairs.firing_B is not None
    firing_B = pairs.firing_B.double()
    firing, pairs_firing = float(firing_B.sum()), float(firing_B.square().sum())
    found: dict[Kernel, float] = {
        by_blocks: 1.5 * d_sae**2 * (rows + d_in),
        by_rows: 2 * d_in * (pairs_firing + GATHERED_ROW * firing) + GATHERED_PAIR * pairs_firing,
    }
    if d_sae <= LARGEST_TABLE:
        entries = TABLE_ENTRY * d_sae * (d_sae + rows)
        found[by_table] = 2 * d_sae**2 * d_in + 2 * SPARSE * firing * d_sae + entries
    return found
