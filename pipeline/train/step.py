"""Training of one SAE, step by step: parameters, optimizer, schedules, dead-latent bookkeeping.

Shapes: B rows, D d_in, F d_sae.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch.optim.adam import adam

from pipeline.sae.sae import SAE
from pipeline.study.recipe import TrainConfig
from pipeline.train import diagnostics, losses
from pipeline.train.gradients import closed_form, row_norms
from pipeline.train.pair_kernels import thresholds
from pipeline.train.resets import INITIAL_ENCODER_NORM, reset_dead, reset_due
from pipeline.train.weights import Weights


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """What one step measured on its own batch, as tensors: turning them into numbers would wait for the device."""

    reconstruction: torch.Tensor
    sparsity: torch.Tensor
    contrast: torch.Tensor
    """As of the last step that computed it; 0 before the first and without contrast."""
    fvu: torch.Tensor
    """Fraction of the batch's variance unexplained."""
    l0: torch.Tensor
    """Mean number of latents that fire on a row."""
    reset_now: int
    """Dead latents that were reset after this step."""


@dataclass(kw_only=True)
class Trainer:
    """One SAE in training. It depends on nothing but its config, its seed and the batches it is given.

    All of it that changes is in `state()`: a Trainer of the same config that loads another's state goes on as that one would
    have, bit for bit on a CPU.
    """

    config: TrainConfig
    d_in: int
    seed: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        d_sae = self.config.d_sae
        # Drawn on the CPU, so that a seed means the same weights on every device.
        self.generator = torch.Generator().manual_seed(self.seed)
        """Goes on from the initialisation; draws the rows that dead latents are reset to."""
        W_dec_FD = torch.randn(d_sae, self.d_in, generator=self.generator)
        W_dec_FD /= W_dec_FD.norm(dim=1, keepdim=True)
        self.weights = Weights(
            W_enc_DF=(INITIAL_ENCODER_NORM * W_dec_FD.T).contiguous().to(self.device),
            b_enc_F=torch.zeros(d_sae, device=self.device),
            W_dec_FD=W_dec_FD.to(self.device),
            b_dec_D=torch.zeros(self.d_in, device=self.device),
        )
        self.first_moment = self.weights.zeros()
        self.second_moment = self.weights.zeros()
        self.threshold_F = torch.zeros(d_sae, device=self.device)
        """Similarity from which on a pair counts, by each latent."""
        self.refreshed = -1
        """Steps taken when the thresholds were computed; -1 when they must be computed anew."""
        self.contrast = torch.zeros((), device=self.device)
        """The contrastive term when it was last computed."""
        self.done = 0
        """Steps taken."""
        self.last_fired_F = torch.zeros(d_sae, dtype=torch.long, device=self.device)
        """Number of steps taken when each latent last fired."""
        self.resets = 0
        """Latents reset so far, one counted each time."""

    @torch.no_grad()
    def step(self, x_BD: torch.Tensor) -> StepMetrics:
        """Take one optimizer step on a batch scaled to E||x||^2 = 1."""
        measured = self._differentiate(x_BD)
        if measured.contrast is not None:
            self.contrast = measured.contrast
        W_dec_FD = self.weights.W_dec_FD
        if self.config.decoder_norm == "unit":
            # Otherwise Adam's moments would hold a component that the renormalisation after the step undoes.
            gradient_FD = measured.gradient.W_dec_FD
            unit_FD = W_dec_FD / row_norms(W_dec_FD)[:, None]
            gradient_FD -= torch.linalg.vecdot(gradient_FD, unit_FD)[:, None] * unit_FD
        self._adam(measured.gradient)
        if self.config.decoder_norm == "unit":
            W_dec_FD /= row_norms(W_dec_FD)[:, None]

        self.done += 1
        self.last_fired_F.masked_fill_(measured.firings_F > 0, self.done)
        reset_now = self._reset(-measured.residual_BD) if reset_due(self.done, self.config) else 0
        return StepMetrics(
            reconstruction=measured.reconstruction,
            sparsity=measured.sparsity,
            contrast=self.contrast,
            fvu=measured.reconstruction / _variance(x_BD),
            l0=measured.firings_F.sum() / len(x_BD),
            reset_now=reset_now,
        )

    def dead(self, window: int) -> torch.Tensor:
        """bool [F]: latents that fired on no row of the last `window` steps."""
        return self.last_fired_F <= self.done - window

    def diagnose(self, x_BD: torch.Tensor) -> diagnostics.Geometry:
        """What is too dear to be measured on every step, on a batch: costs about half a step."""
        return diagnostics.geometry(self.weights, x_BD, literal=self._literal)

    def finished(self, scale: float) -> SAE:
        """The SAE as it is now, for activations before they were multiplied by `scale`."""
        weights = dict(self.weights.named())
        if self._literal:
            weights["W_enc_DF"] = self.weights.W_enc_DF * self.weights.W_dec_FD.norm(dim=1)
        return SAE.folded(**weights, scale=scale)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that changes, by name; the tensors are the Trainer's own, so save or copy them before the next step."""
        counters = {name: torch.tensor(getattr(self, name)) for name in ("done", "resets", "refreshed")}
        return dict(self._tensors()) | counters | {"generator": self.generator.get_state()}

    def load_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from what `state` returned, on this or another device."""
        for name, tensor in self._tensors():
            tensor.copy_(state[name])
        self.done, self.resets, self.refreshed = (int(state[name]) for name in ("done", "resets", "refreshed"))
        self.generator.set_state(state["generator"])

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for prefix in ("weights", "first_moment", "second_moment"):
            yield from ((f"{prefix}.{name}", tensor) for name, tensor in getattr(self, prefix).named())
        for name in ("threshold_F", "contrast", "last_fired_F"):
            yield name, getattr(self, name)

    @property
    def _literal(self) -> bool:
        return self.config.contrast is not None and self.config.contrast.literal

    def _differentiate(self, x_BD: torch.Tensor) -> losses.Pass:
        l1 = self.config.l1 * _ramp(self.done, self.config.l1_warmup)
        contrast = self.config.contrast
        if contrast is None or self.done % contrast.every:
            contrast, weight = None, 0.0
        else:
            weight = contrast.coefficient * contrast.every
        if contrast and contrast.literal:
            return losses.differentiated(self.weights, x_BD, l1=l1, contrast=contrast, weight=weight)
        if contrast and (self.refreshed < 0 or self.done - self.refreshed >= contrast.pair_refresh):
            W_dec_FD = self.weights.W_dec_FD
            self.threshold_F.copy_(thresholds(W_dec_FD, row_norms(W_dec_FD), contrast)[0])
            self.refreshed = self.done
        return closed_form(
            self.weights,
            x_BD,
            l1=l1,
            contrast=contrast,
            weight=weight,
            threshold_F=self.threshold_F,
            precision=self.config.precision,
        )

    def _adam(self, gradient: Weights) -> None:
        tensors = self.weights.tensors()
        adam(
            tensors,
            gradient.tensors(),
            self.first_moment.tensors(),
            self.second_moment.tensors(),
            [],
            [torch.full((), float(self.done), device=self.device) for _ in tensors],
            fused=True,
            amsgrad=False,
            beta1=0.9,
            beta2=0.999,
            lr=self.config.learning_rate * self._lr_factor(),
            weight_decay=0.0,
            eps=1e-8,
            maximize=False,
        )

    def _lr_factor(self) -> float:
        left = self.config.steps - self.done
        decay = int(self.config.lr_decay * self.config.steps)
        return _ramp(self.done, self.config.lr_warmup) * (min(1.0, left / decay) if decay else 1.0)

    def _reset(self, residual_BD: torch.Tensor) -> int:
        assert self.config.resets is not None
        dead_F = self.dead(self.config.resets.every)
        # On the CPU, where the generator is: resets are rare and small.
        on_cpu = self.weights.to("cpu")
        reset = reset_dead(on_cpu, dead_F.cpu(), residual_BD.cpu(), self.generator)
        for tensor, moved in zip(self.weights.tensors(), on_cpu.tensors(), strict=True):
            tensor.copy_(moved)
        reset = reset.to(self.device)
        for moment in (self.first_moment, self.second_moment):
            moment.W_enc_DF[:, reset] = 0
            moment.b_enc_F[reset] = 0
            moment.W_dec_FD[reset] = 0
        self.last_fired_F[reset] = self.done
        if len(reset):
            self.refreshed = -1
        self.resets += len(reset)
        return len(reset)


def _variance(x_BD: torch.Tensor) -> torch.Tensor:
    """mean_b ||x_b - mean x||^2, in two passes over memory; torch.var takes as long as twenty."""
    return torch.linalg.vector_norm(x_BD).square() / len(x_BD) - x_BD.mean(dim=0).square().sum()


def _ramp(done: int, warmup: int) -> float:
    """Rises linearly from 0 before the first step to 1 after `warmup` steps, as in `dictionary_learning`."""
    return min(1.0, done / warmup) if warmup else 1.0
