"""A training step on a GPU: the products of `train/gradients.py`, with all that lies between them fused, and recorded.

It needs an activation and a penalty in closed form; other arms step as they do on a CPU (`train/step.py`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from pipeline.runtime.compiled import recorded
from pipeline.sae.activations import ClosedForm
from pipeline.study.recipe import TrainConfig
from pipeline.train import fused
from pipeline.train.fused import BETAS, NOW
from pipeline.train.losses import Objective
from pipeline.train.penalty import Accumulator, Latents
from pipeline.train.weights import Weights, scratch

PLAIN_STEPS = 3
"""Steps of a kind that are not recorded: what they call for the first time is compiled and set up then."""
MEASURED = ("reconstruction", "sparsity", "penalty", "fvu", "l0")
"""What a step measures, in the order in which it lies on the device."""


@dataclass(kw_only=True)
class Optimized:
    """The tensors of one SAE that a step changes."""

    weights: Weights
    first_moment: Weights
    second_moment: Weights
    last_fired_F: torch.Tensor


def batch(x_BD: torch.Tensor) -> torch.Tensor:
    """The batch in the memory that recorded steps read: the same for all SAEs of a thread."""
    batch_BD = scratch("batch", x_BD, *x_BD.shape)
    return batch_BD if batch_BD is x_BD else batch_BD.copy_(x_BD)


class GpuStep:
    """The steps of one SAE."""

    def __init__(self, state: Optimized, config: TrainConfig, activation: ClosedForm):
        self.optimized, self.activation, self.config = state, activation, config
        self.dtype: torch.dtype = getattr(torch, config.precision)
        like = state.weights.b_enc_F
        self.now = torch.zeros(len(NOW), device=like.device)
        self.measured = torch.zeros(len(MEASURED), device=like.device)
        self.taken = {False: 0, True: 0}
        self.recordings: dict[bool, tuple[torch.Tensor, Callable[[], object]]] = {}

    @property
    def terms(self) -> dict[str, torch.Tensor]:
        """What the last step measured; the next one overwrites it."""
        return {name: self.measured[place] for place, name in enumerate(MEASURED) if name != "penalty"}

    @property
    def last_penalty(self) -> torch.Tensor:
        """The penalty of the last step that computed it."""
        return self.measured[MEASURED.index("penalty")]

    def take(self, x_BD: torch.Tensor, objective: Objective, *, step: int, rate: float, keep: bool) -> torch.Tensor | None:
        """Take a step. Returns x^ - x up to a positive factor if it is to be kept."""
        corrections = [1 - beta**step for beta in BETAS]
        for place, value in enumerate((rate / corrections[0], math.sqrt(corrections[1]), objective.l1, step)):
            self.now[place].fill_(value)
        penalty = objective.penalty
        penalised = penalty is not None
        self.taken[penalised] += 1
        if keep or self.taken[penalised] <= PLAIN_STEPS or not (penalty is None or penalty.recordable):
            return self._step(x_BD, objective)
        batch_BD = batch(x_BD)
        known = self.recordings.get(penalised)
        if known is None or known[0] is not batch_BD:
            known = batch_BD, recorded(lambda: self._step(batch_BD, objective))
            self.recordings[penalised] = known
        known[1]()
        return None

    def _step(self, x_BD: torch.Tensor, objective: Objective) -> torch.Tensor:
        weights, now, rows, dtype, penalty = self.optimized.weights, self.now, len(x_BD), self.dtype, objective.penalty
        centred_BD, variance = fused.centred(x_BD, weights.b_dec_D, dtype)
        W_dec_FD, norm_F = fused.decoder(weights.W_dec_FD, dtype)
        pre_BF = centred_BD @ weights.W_enc_DF.to(dtype)
        dtypes = dtype, getattr(torch, penalty.reads) if penalty else dtype
        f_BF, f_read_BF, f_sum_F, firings_F, firing_B = fused.latents(pre_BF, weights.b_enc_F, self.activation, dtypes)
        residual_BD, reconstruction, residual_D = fused.residual(f_BF @ W_dec_FD, x_BD, weights.b_dec_D, dtype)
        gradient_BF, gradient_FD = residual_BD @ W_dec_FD.T, f_BF.T @ residual_BD
        if penalty:
            into = Accumulator(f_BF=gradient_BF.float(), W_dec_FD=gradient_FD.float(), weight=objective.weight)
            read = Latents(f_BF=f_read_BF, firing_B=firing_B, W_dec_FD=weights.W_dec_FD, norm_F=norm_F)
            self.last_penalty.copy_(penalty.add_gradient(read, into))
            gradient_BF, gradient_FD = into.f_BF, into.W_dec_FD
        gradient_BF, gradient_F = fused.pre_gradient(gradient_BF, f_BF, norm_F, now, self.activation, dtype)
        gradient = Weights(
            W_enc_DF=centred_BD.T @ gradient_BF,
            b_enc_F=gradient_F,
            W_dec_FD=gradient_FD,
            b_dec_D=residual_D - torch.mv(weights.W_enc_DF, gradient_F),
        )
        f_mean_F = f_sum_F / rows
        self._update(gradient, f_mean_F, norm_F)
        fused.finish(
            self.optimized.last_fired_F, self.measured, firings_F, f_mean_F, norm_F, reconstruction, variance, self.now, rows
        )
        return residual_BD

    def _update(self, gradient: Weights, f_mean_F: torch.Tensor, norm_F: torch.Tensor) -> None:
        optimized = self.optimized
        tensors = (optimized.weights, optimized.first_moment, optimized.second_moment, gradient)
        for name, weight in optimized.weights.named():
            weight, first, second, by = (getattr(each, name) for each in tensors)
            if name == "W_dec_FD":
                unit = self.config.decoder_norm == "unit"
                fused.update_decoder(weight, first, second, by, f_mean_F, norm_F, self.now, unit)
            else:
                fused.update(weight, first, second, by, self.now)
