"""A training step on a GPU: the products of `train/gradients.py`, with all that lies between them compiled, and recorded.

It needs an activation and a penalty in closed form; other arms step as they do on a CPU (`train/step.py`).
"""

import math
from dataclasses import dataclass

import torch

from pipeline.runtime.compiled import Replayed
from pipeline.sae.activation import ClosedForm
from pipeline.study.recipe import TrainConfig
from pipeline.train import fused
from pipeline.train.fused import BETAS, MEASURED, NOW
from pipeline.train.losses import Objective
from pipeline.train.penalty import Accumulator, Latents
from pipeline.train.weights import Weights, scratch


@dataclass(kw_only=True)
class Optimized:
    """The tensors of one SAE that a step changes."""

    weights: Weights
    first_moment: Weights
    second_moment: Weights
    last_fired_F: torch.Tensor

    def named(self, name: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """A weight and its moments."""
        weight, first, second = (getattr(each, name) for each in (self.weights, self.first_moment, self.second_moment))
        return weight, first, second


def batch(x_BD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch and its variance, in the memory that recorded steps read: the same for all SAEs of a thread."""
    batch_BD, variance = scratch("batch", x_BD, *x_BD.shape), scratch("variance", x_BD)
    if batch_BD is not x_BD:
        batch_BD.copy_(x_BD)
        variance.copy_(fused.variance(batch_BD))
    return batch_BD, variance


class GpuStep:
    """The steps of one SAE."""

    def __init__(self, optimized: Optimized, config: TrainConfig, activation: ClosedForm):
        self.optimized, self.activation, self.config = optimized, activation, config
        self.dtype: torch.dtype = getattr(torch, config.precision)
        like = optimized.weights.b_enc_F
        self.now, self.measured = like.new_zeros(len(NOW)), like.new_zeros(len(MEASURED))
        self.last_penalty = like.new_zeros(())
        """The penalty of the last step that computed it."""
        self.replayed: dict[tuple[bool, torch.Tensor], Replayed] = {}
        """By whether the penalty is computed, and the memory of the batch."""

    @property
    def terms(self) -> dict[str, torch.Tensor]:
        """What the last step measured; the next one overwrites it."""
        return {name: self.measured[place] for place, name in enumerate(MEASURED)}

    def take(self, x_BD: torch.Tensor, objective: Objective, *, step: int, rate: float, keep: bool) -> torch.Tensor | None:
        """Take a step. Returns x^ - x up to a positive factor if it is to be kept."""
        corrections = [1 - beta**step for beta in BETAS]
        for place, value in enumerate((rate / corrections[0], math.sqrt(corrections[1]), objective.l1, step)):
            self.now[place].fill_(value)
        batch_BD, variance = batch(x_BD)
        penalty = objective.penalty
        if keep or (penalty and not penalty.recordable):
            return self._step(batch_BD, variance, objective)
        replayed = self.replayed.setdefault((penalty is not None, batch_BD), Replayed())
        replayed(lambda: self._step(batch_BD, variance, objective), batch_BD.device)
        return None

    def _step(self, x_BD: torch.Tensor, variance: torch.Tensor, objective: Objective) -> torch.Tensor:
        weights, now, rows, dtype, penalty = self.optimized.weights, self.now, len(x_BD), self.dtype, objective.penalty
        centred_BD = fused.centred(x_BD, weights.b_dec_D, dtype)
        W_dec_FD, norm_F = fused.decoder(weights.W_dec_FD, dtype)
        pre_BF = centred_BD @ weights.W_enc_DF.to(dtype)
        dtypes = dtype, getattr(torch, penalty.reads) if penalty else dtype
        f_BF, f_read_BF, f_mean_F, firings_F = fused.latents(pre_BF, weights.b_enc_F, norm_F, self.activation, dtypes)
        residual_BD, reconstruction, residual_D = fused.residual(f_BF @ W_dec_FD, x_BD, weights.b_dec_D, dtype)
        # Where the penalty's gradient is added to these, the sums are rounded to their dtype as the products are.
        f_gradient_BF, W_gradient_FD = residual_BD @ W_dec_FD.T, f_BF.T @ residual_BD
        along_F = None
        if penalty:
            along_F = torch.zeros_like(norm_F)
            into = Accumulator(f_BF=f_gradient_BF, W_dec_FD=W_gradient_FD, along_F=along_F, weight=objective.weight)
            read = Latents(f_BF=f_read_BF, W_dec_FD=weights.W_dec_FD, norm_F=norm_F, rounded_FD=W_dec_FD)
            self.last_penalty.copy_(penalty.add_gradient(read, into))
        pre_gradient_BF, b_gradient_F = fused.pre_gradient(f_gradient_BF, f_BF, norm_F, now, self.activation, dtype)
        b_dec_gradient_D = residual_D - torch.mv(weights.W_enc_DF, b_gradient_F)
        unit = self.config.decoder_norm == "unit"
        fused.update_decoder(self.optimized.named("W_dec_FD"), W_gradient_FD, along_F, f_mean_F, norm_F, now, unit)
        fused.update(*self.optimized.named("W_enc_DF"), centred_BD.T @ pre_gradient_BF, now)
        fused.update(*self.optimized.named("b_enc_F"), b_gradient_F, now)
        fused.update(*self.optimized.named("b_dec_D"), b_dec_gradient_D, now)
        scalars = reconstruction, variance
        fused.note(self.optimized.last_fired_F, self.measured, firings_F, f_mean_F, norm_F, scalars, now, rows)
        return residual_BD
