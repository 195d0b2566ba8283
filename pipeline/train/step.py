"""Training of one SAE, step by step: parameters, optimizer, schedules, dead-latent bookkeeping.

Shapes: B rows, D d_in, F d_sae.
"""

from dataclasses import dataclass, field

import torch

from pipeline.experiment import TrainConfig
from pipeline.sae import SAE
from pipeline.train import losses
from pipeline.train.resets import INITIAL_ENCODER_NORM, reset_dead, reset_due


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What one step measured on its own batch, as tensors: turning them into numbers would wait for the device."""

    reconstruction: torch.Tensor
    sparsity: torch.Tensor
    contrast: torch.Tensor
    fvu: torch.Tensor
    """Fraction of the batch's variance unexplained."""
    l0: torch.Tensor
    """Mean number of latents that fire on a row."""


@dataclass(kw_only=True)
class Trainer:
    """One SAE in training. It depends on nothing but its config, its seed and the batches it is given."""

    config: TrainConfig
    d_in: int
    seed: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        # Drawn on the CPU, so that a seed means the same weights on every device.
        generator = torch.Generator().manual_seed(self.seed)
        W_dec_FD = torch.randn(self.config.d_sae, self.d_in, generator=generator)
        W_dec_FD /= W_dec_FD.norm(dim=1, keepdim=True)
        W_enc_DF = (INITIAL_ENCODER_NORM * W_dec_FD.T).contiguous()
        self.W_dec_FD = W_dec_FD.to(self.device).requires_grad_()
        self.W_enc_DF = W_enc_DF.to(self.device).requires_grad_()
        self.b_enc_F = torch.zeros(self.config.d_sae, device=self.device, requires_grad=True)
        self.b_dec_D = torch.zeros(self.d_in, device=self.device, requires_grad=True)
        self.optimizer = torch.optim.Adam(
            [self.W_enc_DF, self.b_enc_F, self.W_dec_FD, self.b_dec_D], lr=self.config.learning_rate, fused=True
        )
        self.generator = generator
        """Goes on from the initialisation; draws the rows that dead latents are reset to."""
        self.done = 0
        """Steps taken."""
        self.last_fired_F = torch.zeros(self.config.d_sae, dtype=torch.long, device=self.device)
        """Number of steps taken when each latent last fired."""
        self.resets = 0
        """Latents reset so far, one counted each time."""

    def step(self, x_BD: torch.Tensor) -> StepMetrics:
        """Take one optimizer step on a batch scaled to E||x||^2 = 1."""
        config = self.config
        f_BF = torch.relu((x_BD - self.b_dec_D) @ self.W_enc_DF + self.b_enc_F)
        reconstructed_BD = f_BF @ self.W_dec_FD + self.b_dec_D
        reconstruction = losses.reconstruction(x_BD, reconstructed_BD)
        sparsity = losses.sparsity(f_BF, self.W_dec_FD.norm(dim=1))
        contrast = torch.zeros_like(reconstruction)
        loss = reconstruction + config.l1 * _ramp(self.done, config.l1_warmup) * sparsity
        if config.contrast:
            contrast = losses.contrastive(f_BF, self.W_dec_FD, config.contrast)
            loss = loss + config.contrast.coefficient * contrast

        self.optimizer.zero_grad()
        loss.backward()
        if config.decoder_norm == "unit":
            self._remove_radial_gradient()
        self.optimizer.param_groups[0]["lr"] = config.learning_rate * self._lr_factor()
        self.optimizer.step()
        if config.decoder_norm == "unit":
            with torch.no_grad():
                self.W_dec_FD /= self.W_dec_FD.norm(dim=1, keepdim=True)

        self.done += 1
        with torch.no_grad():
            fired_BF = f_BF > 0
            self.last_fired_F[fired_BF.any(dim=0)] = self.done
            residual_BD = x_BD - reconstructed_BD
            if reset_due(self.done, config):
                self._reset(residual_BD)
            return StepMetrics(
                reconstruction=reconstruction.detach(),
                sparsity=sparsity.detach(),
                contrast=contrast.detach(),
                fvu=residual_BD.square().sum() / (x_BD - x_BD.mean(dim=0)).square().sum(),
                l0=fired_BF.sum(dim=1).float().mean(),
            )

    def dead(self, window: int) -> torch.Tensor:
        """bool [F]: latents that fired on no row of the last `window` steps."""
        return self.last_fired_F <= self.done - window

    def finished(self, scale: float) -> SAE:
        """The SAE as it is now, for activations before they were multiplied by `scale`."""
        with torch.no_grad():
            return SAE.folded(
                W_enc_DF=self.W_enc_DF.detach(),
                b_enc_F=self.b_enc_F.detach(),
                W_dec_FD=self.W_dec_FD.detach(),
                b_dec_D=self.b_dec_D.detach(),
                scale=scale,
            )

    def _lr_factor(self) -> float:
        left = self.config.steps - self.done
        decay = int(self.config.lr_decay * self.config.steps)
        return _ramp(self.done, self.config.lr_warmup) * (min(1.0, left / decay) if decay else 1.0)

    @torch.no_grad()
    def _remove_radial_gradient(self) -> None:
        # Otherwise Adam's moments would hold a component that the renormalisation after the step undoes.
        grad_FD = self.W_dec_FD.grad
        assert grad_FD is not None
        unit_FD = self.W_dec_FD / self.W_dec_FD.norm(dim=1, keepdim=True)
        grad_FD -= (grad_FD * unit_FD).sum(dim=1, keepdim=True) * unit_FD

    @torch.no_grad()
    def _reset(self, residual_BD: torch.Tensor) -> None:
        assert self.config.resets is not None
        dead_F = self.dead(self.config.resets.every)
        # On the CPU, where the generator is: resets are rare and small.
        W_enc_DF, b_enc_F, W_dec_FD = self.W_enc_DF.cpu(), self.b_enc_F.cpu(), self.W_dec_FD.cpu()
        reset = reset_dead(W_enc_DF, b_enc_F, W_dec_FD, dead_F.cpu(), residual_BD.cpu(), self.generator)
        self.W_enc_DF.copy_(W_enc_DF)
        self.b_enc_F.copy_(b_enc_F)
        self.W_dec_FD.copy_(W_dec_FD)
        for parameter, index in (
            (self.W_enc_DF, (slice(None), reset)),
            (self.b_enc_F, (reset,)),
            (self.W_dec_FD, (reset,)),
        ):
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimizer.state[parameter][moment][index] = 0
        self.last_fired_F[reset.to(self.device)] = self.done
        self.resets += len(reset)


def _ramp(done: int, warmup: int) -> float:
    """Rises linearly from 0 before the first step to 1 after `warmup` steps, as in `dictionary_learning`."""
    return min(1.0, done / warmup) if warmup else 1.0
