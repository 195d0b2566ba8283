"""Defines how training computes a penalty: as a term of the loss that depends on the latents and the decoder of one SAE."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from pipeline.section import Dtype
from pipeline.study.penalties import PENALTIES, Contrast, PenaltySection
from pipeline.study.stage_code import imported
from pipeline.train.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Latents:
    """The latents of a batch and the decoder: what a penalty and its gradient are computed from."""

    f_BF: torch.Tensor
    W_dec_FD: torch.Tensor
    norm_F: torch.Tensor
    """Norms of the decoder rows."""
    firing_B: torch.Tensor | None = None
    """Number of latents that fire on each row; None on a GPU, where only the choice of a kernel would need it."""
    rounded_FD: torch.Tensor | None = None
    """The decoder as the operand of the step's own products, where the step keeps it."""


@dataclass(frozen=True, kw_only=True)
class Accumulator:
    """The gradients so far, to which a penalty adds `weight` times its own, in place."""

    f_BF: torch.Tensor
    W_dec_FD: torch.Tensor
    weight: float
    along_F: torch.Tensor | None = None
    """Factors of the decoder rows in their own gradient, added later; None where they must be added at once."""


class PenaltyTerm(ABC):
    """One penalty of one SAE. A subclass states the definition; the gradient follows by autograd or from its own kernel."""

    name: ClassVar[str]
    """Its name in the training log."""
    rescales_encoder: ClassVar[bool] = False
    """True if `encoder_scale` returns a factor. Autograd then differentiates the whole step."""

    recordable: ClassVar[bool] = False
    """True if `add_gradient` never waits for a GPU nor depends on values there, so that a step can be recorded."""

    def __init__(self, section: Any, weights: Weights):
        self.section = section
        """Its section of the recipe."""
        self.weights = weights
        """Those of the SAE, which training changes in place."""

    @property
    def reads(self) -> Dtype:
        """Dtype in which `add_gradient` needs the latents on a GPU."""
        return "float32"

    @abstractmethod
    def definition(self, f_BF: torch.Tensor, W_dec_FD: torch.Tensor) -> torch.Tensor:
        """The penalty on a batch, a scalar that autograd can differentiate."""

    def add_gradient(self, latents: Latents, into: Accumulator) -> torch.Tensor:
        """Add the gradient to `into`; returns the penalty. By default autograd differentiates the definition."""
        f_BF, W_dec_FD = latents.f_BF.detach().requires_grad_(), latents.W_dec_FD.detach().requires_grad_()
        with torch.enable_grad():
            penalty = self.definition(f_BF, W_dec_FD)
            f_gradient_BF, W_gradient_FD = torch.autograd.grad(penalty, (f_BF, W_dec_FD), materialize_grads=True)
        into.f_BF.add_(f_gradient_BF, alpha=into.weight)
        into.W_dec_FD.add_(W_gradient_FD, alpha=into.weight)
        return penalty.detach()

    def encoder_scale(self, norm_F: torch.Tensor) -> torch.Tensor | None:  # noqa: ARG002 - for subclasses
        """Factor [F] on the encoder's product, before the bias, given the decoder norms; None leaves it as it is."""
        return None

    def prepare(self, done: int) -> None:  # noqa: B027 - most keep nothing
        """Called before `add_gradient` on the step after `done` steps, to renew what is kept for several steps."""

    def latents_were_reset(self) -> None:  # noqa: B027 - most keep nothing
        """Called after a reset of dead latents: what is kept of the decoder no longer holds."""

    def state(self) -> dict[str, torch.Tensor]:
        """All mutable state, by name."""
        return {}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:  # noqa: B027 - most keep nothing
        """Take over what `state()` returned. The argument also holds the entries of the `Trainer`."""


def penalty_term(section: Contrast | PenaltySection, weights: Weights) -> PenaltyTerm:
    """The term of a penalty that an arm declares."""
    return imported(PENALTIES[section.kind].term)(section, weights)
