"""Measures an SAE's geometry for the training log. The definition is the same for every arm, whatever its penalty."""

from dataclasses import dataclass

import torch

from pipeline.sae.activation import Trainable
from pipeline.study.penalties import Contrast
from pipeline.train import pair_kernels, pair_selection
from pipeline.train.losses import pre_activations
from pipeline.train.penalty import PenaltyTerm
from pipeline.train.weights import Weights, decoder_norms

PAIRS = Contrast()
"""The pairs that interference is summed over: by direction, top 10 %, union; whatever the arm itself penalises."""


@dataclass(frozen=True, kw_only=True)
class Geometry:
    """Measurements on one batch, as tensors."""

    interference: torch.Tensor
    """mean_b sum_{i<j} M_ij C_ij a_bi a_bj over the pairs in PAIRS, with exact thresholds."""
    nearest: torch.Tensor
    """mean_i max_{j != i} C_ij: the cosine of a latent to its nearest neighbour."""


@torch.no_grad()
def geometry(weights: Weights, x_BD: torch.Tensor, activation: Trainable, penalty: PenaltyTerm | None) -> Geometry:
    """Measure one SAE on a batch [B, D]; `penalty` is the arm's own, which may rescale the encoder."""
    norm_F = decoder_norms(weights.W_dec_FD)
    pre_BF = pre_activations(weights, x_BD, penalty.encoder_scale(norm_F) if penalty else None)
    f_BF = activation.with_thresholds(weights.threshold_F).in_training(pre_BF, norm_F)
    threshold_F, nearest_F = pair_selection.thresholds(weights.W_dec_FD, norm_F, PAIRS)
    pairs = pair_selection.SelectedPairs(
        f_BF=f_BF,
        firing_B=torch.sign(f_BF).sum(dim=1),
        W_dec_FD=weights.W_dec_FD,
        norm_F=norm_F,
        threshold_F=threshold_F,
        config=PAIRS,
    )
    return Geometry(interference=pair_kernels.penalty(pairs, None), nearest=nearest_F.mean())
