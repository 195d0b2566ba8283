"""Trains one SAE step by step: holds its parameters and optimizer, follows its schedules, tracks and resets dead latents."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch.optim.adam import adam

from pipeline.runtime.linalg import vecdot, vector_norm
from pipeline.sae.activation import ClosedForm
from pipeline.sae.activations import ACTIVATIONS
from pipeline.sae.sae import SAE
from pipeline.study.recipe import TrainConfig
from pipeline.train import diagnostics, losses
from pipeline.train.auxk import AuxKTerm
from pipeline.train.frozen import freeze, keep_near_
from pipeline.train.fused import BETAS, EPSILON
from pipeline.train.gradients import closed_form
from pipeline.train.losses import Differentiated, Objective
from pipeline.train.on_gpu import GpuStep, Optimized
from pipeline.train.penalty import penalty_term
from pipeline.train.resets import INITIAL_ENCODER_NORM, reset_dead, reset_due
from pipeline.train.sparse_step import is_sparse, sparse_form
from pipeline.train.steering import Steering
from pipeline.train.weights import Weights, decoder_norms

NO_PENALTY = "contrast"
"""An arm without a penalty logs a penalty of 0 under this name."""


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """Measurements of one step on its batch, as tensors: turning them into numbers would wait for the device."""

    terms: dict[str, torch.Tensor]
    """The terms of the loss by name, unweighted. A penalty is that of the last step that computed it, 0 before the first."""
    fvu: torch.Tensor
    """Fraction of variance unexplained on the batch."""
    l0: torch.Tensor
    """Mean number of latents that fire on a row."""
    reset_now: int
    """Dead latents that were reset after this step."""


@dataclass(kw_only=True)
class Trainer:
    """One SAE in training. It depends only on its config, its seed and the batches it is given.

    `state()` is all mutable state; loading it resumes bit for bit on a CPU.
    """

    config: TrainConfig
    d_in: int
    seed: int
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        d_sae = self.config.d_sae
        # Drawn on the CPU, so that a seed means the same weights on every device.
        self.generator = torch.Generator().manual_seed(self.seed)
        """Draws the initial weights, then the rows that dead latents are reset to."""
        W_dec_FD = torch.randn(d_sae, self.d_in, generator=self.generator)
        W_dec_FD.div_(vector_norm(W_dec_FD, dim=1, keepdim=True))
        self.activation = ACTIVATIONS[self.config.activation].for_training(self.config)
        first = self.activation.first_threshold
        encoder_norm = 1.0 if self.config.frozen == "both" else INITIAL_ENCODER_NORM  # a random SAE is tied
        self.weights = Weights(
            W_enc_DF=(encoder_norm * W_dec_FD.T).contiguous().to(self.device),
            b_enc_F=torch.zeros(d_sae, device=self.device),
            W_dec_FD=W_dec_FD.to(self.device),
            b_dec_D=torch.zeros(self.d_in, device=self.device),
            threshold_F=None if first is None else torch.full((d_sae,), first, device=self.device),
        )
        self.start_FD = self.weights.W_dec_FD.clone() if self.config.frozen == "soft-decoder" else None
        """The decoder as it was drawn, where it must stay near."""
        self.first_moment = self.weights.zeros()
        self.second_moment = self.weights.zeros()
        self.steering = Steering(self.config.steered_to, self.device) if self.config.steered_to else None
        section = self.config.only_penalty
        self.penalty = penalty_term(section, self.weights) if section else None
        self.done = 0
        """Steps taken."""
        self.last_fired_F = torch.zeros(d_sae, dtype=torch.long, device=self.device)
        """The step on which each latent last fired or was reset; 0 before either."""
        self.on_gpu = self._gpu_step()
        """Takes the steps on a GPU; None where they are taken as they are written."""
        self.last_penalty = self.on_gpu.last_penalty if self.on_gpu else torch.zeros((), device=self.device)
        """The penalty when it was last computed."""
        self.resets = 0
        """Resets so far. A latent that was reset twice counts twice."""

    @torch.no_grad()
    def step(self, x_BD: torch.Tensor) -> StepMetrics:
        """Take one optimizer step on a batch scaled to E||x||^2 = 1."""
        objective = self._objective()
        rate = self.config.learning_rate * self._schedule()
        self.done += 1
        resetting = reset_due(self.done, self.config)
        if self.on_gpu:
            residual_BD = self.on_gpu.take(x_BD, objective, step=self.done, rate=rate, keep=resetting)
            measured = self.on_gpu.terms
        else:
            residual_BD, measured = self._eager(x_BD, objective, rate)
        if self.steering:
            self.steering.observe(measured["l0"], self.done)
        reset_now = self._reset(-residual_BD) if resetting and residual_BD is not None else 0
        penalty = self.penalty.name if self.penalty else NO_PENALTY
        terms = {name: measured.get(name, self.last_penalty) for name in ("reconstruction", "sparsity", penalty)}
        if self.config.prefixes:
            terms["prefixes"] = measured["prefixes"]
        if self.config.auxk:
            terms["auxk"] = measured.get("auxk", torch.zeros((), device=self.device))
        return StepMetrics(terms=terms, fvu=measured["fvu"], l0=measured["l0"], reset_now=reset_now)

    def _eager(self, x_BD: torch.Tensor, objective: Objective, rate: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Take a step operation by operation; returns x^ - x up to a positive factor, and what was measured."""
        measured = self._differentiate(x_BD, objective)
        if self.penalty:
            self.last_penalty = measured.terms.get(self.penalty.name, self.last_penalty)
        W_dec_FD = self.weights.W_dec_FD
        if self.config.decoder_norm == "unit":
            # Otherwise Adam's moments would hold a component that the renormalisation after the step undoes.
            gradient_FD = measured.gradient.W_dec_FD
            unit_FD = W_dec_FD / decoder_norms(W_dec_FD)[:, None]
            radial_F = vecdot(gradient_FD, unit_FD)
            gradient_FD.sub_(radial_F[:, None] * unit_FD)
        freeze(self.config.frozen, measured.gradient)
        self._adam(measured.gradient, rate)
        if self.weights.threshold_F is not None:
            self.weights.threshold_F.clamp_(min=0)  # below 0, latents would be negative
        if self.start_FD is not None:
            keep_near_(W_dec_FD, self.start_FD)
        if self.config.decoder_norm == "unit":
            W_dec_FD /= decoder_norms(W_dec_FD)[:, None]
        self.last_fired_F.masked_fill_(measured.firings_F > 0, self.done)
        fvu, l0 = measured.terms["reconstruction"] / _variance(x_BD), measured.firings_F.sum() / len(x_BD)
        return measured.residual_BD, measured.terms | {"fvu": fvu, "l0": l0}

    def dead(self, window: int) -> torch.Tensor:
        """bool [F]: latents that fired on no row of the last `window` steps."""
        return self.last_fired_F <= self.done - window

    def diagnose(self, x_BD: torch.Tensor) -> diagnostics.Geometry:
        """Geometry on a batch; takes about half the time of a step, so it is not measured on every one."""
        return diagnostics.geometry(self.weights, x_BD, self.activation, self.penalty)

    def finished(self, scale: float) -> SAE:
        """The SAE as it is now, for activations before they were multiplied by `scale`."""
        weights = dict(self.weights.named())
        activation = self.activation.with_thresholds(weights.pop("threshold_F", None))
        norm_F = vector_norm(self.weights.W_dec_FD, dim=1)
        scale_F = self.penalty.encoder_scale(norm_F) if self.penalty else None
        if scale_F is not None:
            weights["W_enc_DF"] = self.weights.W_enc_DF * scale_F
        return SAE.folded(**weights, scale=scale, activation=activation.finished(norm_F))

    def state(self) -> dict[str, torch.Tensor]:
        """All mutable state, by name. The tensors are the Trainer's own: save or copy them before the next step."""
        counters = {"done": torch.tensor(self.done), "resets": torch.tensor(self.resets)}
        state = dict(self._tensors()) | counters | {"generator": self.generator.get_state()}
        for part in (self.penalty, self.activation, self.steering):
            state |= part.state() if part else {}
        return state

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from what `state` returned, on this or another device."""
        for name, tensor in self._tensors():
            tensor.copy_(state[name])
        self.done, self.resets = int(state["done"]), int(state["resets"])
        for part in (self.penalty, self.activation, self.steering):
            if part:
                part.load_state(state)
        self.generator.set_state(state["generator"])

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for prefix in ("weights", "first_moment", "second_moment"):
            yield from ((f"{prefix}.{name}", tensor) for name, tensor in getattr(self, prefix).named())
        yield "contrast", self.last_penalty  # the name that checkpoints have had for it since the contrast was the only one
        yield "last_fired_F", self.last_fired_F
        if self.start_FD is not None:
            yield "start_FD", self.start_FD

    @property
    def _has_closed_form(self) -> bool:
        return isinstance(self.activation, ClosedForm) and not (self.penalty and self.penalty.rescales_encoder)

    def _differentiate(self, x_BD: torch.Tensor, objective: Objective) -> Differentiated:
        if self._has_closed_form and is_sparse(self.weights, objective, self.config.k):
            return sparse_form(self.weights, x_BD, objective, precision=self.config.precision)
        if self._has_closed_form:
            return closed_form(self.weights, x_BD, objective, precision=self.config.precision)
        return losses.differentiated(self.weights, x_BD, objective)

    def _objective(self) -> Objective:
        """Of the next step."""
        l1 = 0.0 if self.activation.fixes_l0 else self.config.l1 * _ramp(self.done, self.config.l1_warmup)
        l1 *= self.steering.factor if self.steering else 1.0
        plain = Objective(activation=self.activation, l1=l1, auxk=self._auxk(), prefixes=self.config.prefixes or ())
        section, penalty = self.config.only_penalty, self.penalty
        if section is None or penalty is None:
            return plain
        if self.done % section.every:
            # The penalty has weight 0 on this step, but one that rescales the encoder does so on every step.
            return replace(plain, penalty=penalty if penalty.rescales_encoder else None)
        penalty.prepare(self.done)
        return replace(plain, penalty=penalty, weight=section.coefficient * section.every)

    def _auxk(self) -> AuxKTerm | None:
        section = self.config.auxk
        if section is None:
            return None
        # As `dictionary_learning` counts: the step to be taken is one of those on which it did not fire.
        dead_F = self.dead(-(-section.dead_after // self.config.batch_size) - 1)
        if not dead_F.any():
            return None
        return AuxKTerm(weight=section.weight, kept=section.latents or self.d_in // 2, dead_F=dead_F)

    def _gpu_step(self) -> GpuStep | None:
        if self.device.type != "cuda" or self.config.frozen or not self._has_closed_form:
            return None
        if not isinstance(self.activation, ClosedForm) or not self.activation.compiles:
            return None
        state = Optimized(
            weights=self.weights,
            first_moment=self.first_moment,
            second_moment=self.second_moment,
            last_fired_F=self.last_fired_F,
        )
        return GpuStep(state, self.config, self.activation)

    def _adam(self, gradient: Weights, rate: float) -> None:
        tensors = self.weights.tensors()
        adam(
            tensors,
            gradient.tensors(),
            self.first_moment.tensors(),
            self.second_moment.tensors(),
            [],
            [torch.full((), float(self.done - 1), device=self.device) for _ in tensors],  # Adam counts this step itself
            fused=True,
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=rate,
            weight_decay=0.0,
            eps=EPSILON,
            maximize=False,
        )

    def _schedule(self) -> float:
        """Factor on the learning rate of the next step: warm-up, then linear decay at the end."""
        left = self.config.steps - self.done
        decay = int(self.config.lr_decay * self.config.steps)
        return _ramp(self.done, self.config.lr_warmup) * (min(1.0, left / decay) if decay else 1.0)

    def _reset(self, residual_BD: torch.Tensor) -> int:
        assert self.config.resets is not None
        dead_F = self.dead(self.config.resets.every)
        # On the CPU, where the generator is. Resets are rare and small.
        on_cpu = self.weights.to("cpu")
        reset = reset_dead(on_cpu, dead_F.cpu(), residual_BD.cpu(), self.generator)
        for tensor, moved in zip(self.weights.tensors(), on_cpu.tensors(), strict=True):
            tensor.copy_(moved)
        reset = reset.to(self.device)
        for moment in (self.first_moment, self.second_moment):
            moment.W_enc_DF[:, reset] = 0
            moment.b_enc_F[reset] = 0
            moment.W_dec_FD[reset] = 0
            if moment.threshold_F is not None:
                moment.threshold_F[reset] = 0
        threshold_F, first = self.weights.threshold_F, self.activation.first_threshold
        if threshold_F is not None and first is not None:
            threshold_F[reset] = first
        self.last_fired_F[reset] = self.done
        if len(reset) and self.penalty:
            self.penalty.latents_were_reset()
        self.resets += len(reset)
        return len(reset)


def _variance(x_BD: torch.Tensor) -> torch.Tensor:
    """mean_b ||x_b - mean x||^2 in two passes over memory; torch.var takes as long as twenty passes."""
    return vector_norm(x_BD).square() / len(x_BD) - x_BD.mean(dim=0).square().sum()


def _ramp(done: int, warmup: int) -> float:
    """Rises linearly from 0 before the first step to 1 after `warmup` steps, as in `dictionary_learning`."""
    return min(1.0, done / warmup) if warmup else 1.0
