"""What the log shows of an SAE's geometry, defined alike for every arm, with and without contrast.

Shapes: B rows, D d_in, F d_sae.
"""

from dataclasses import dataclass

import torch

from pipeline.study.recipe import Contrast
from pipeline.train.gradients import row_norms
from pipeline.train.pair_kernels import Latents, contrastive, thresholds
from pipeline.train.weights import Weights

PAIRS = Contrast()
"""The pairs that interference is summed over: by direction, top 10 %, union; whatever the arm itself penalises."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Measurements on one batch, as tensors."""

    interference: torch.Tensor
    """mean_b sum_{i<j} M_ij C_ij a_bi a_bj over the pairs in PAIRS, with exact thresholds."""
    nearest: torch.Tensor
    """mean_i max_{j != i} C_ij: how close a latent's nearest neighbour points."""


@torch.no_grad()
def geometry(weights: Weights, x_BD: torch.Tensor, *, literal: bool) -> Geometry:
    """Measure one SAE; `literal` tells that norms are multiplied into its encoder."""
    norm_F = row_norms(weights.W_dec_FD)
    encoded_BF = torch.mm(x_BD - weights.b_dec_D, weights.W_enc_DF)
    if literal:
        encoded_BF *= norm_F
    threshold_F, nearest_F = thresholds(weights.W_dec_FD, norm_F, PAIRS)
    f_BF = encoded_BF.add_(weights.b_enc_F).relu_()
    latents = Latents(
        f_BF=f_BF,
        firing_B=torch.sign(f_BF).sum(dim=1),
        W_dec_FD=weights.W_dec_FD,
        norm_F=norm_F,
        threshold_F=threshold_F,
        config=PAIRS,
    )
    return Geometry(interference=contrastive(latents, None), nearest=nearest_F.mean())
