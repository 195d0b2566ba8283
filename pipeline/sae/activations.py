"""The activation functions of SAEs: which latents fire in training, which fire afterwards, and what SAELens calls them.

Training, evaluation, the training log, the random null and the export all go through an entry of ACTIVATIONS. torch is not
imported before one is called: an experiment that names an activation is validated without it.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch


class Activation(ABC):
    """From pre-activations [B, F] to latents [B, F]. A latent fires where it is above 0.

    a(c x) = c a(x) for c > 0, because decoder norms are folded into the encoder (`SAE.folded`).
    """

    architecture: ClassVar[str]
    """What `cfg.json` calls an SAE with this activation."""
    in_saelens: ClassVar[bool] = False
    """Whether that is SAELens' own name for the same function. Other SAEs cannot be exported to it."""

    @abstractmethod
    def __call__(self, pre_BF: "torch.Tensor") -> "torch.Tensor":
        """Latents of a finished SAE."""

    def in_training(self, pre_BF: "torch.Tensor") -> "torch.Tensor":
        """Latents while training, differentiable. By default those of a finished SAE."""
        return self(pre_BF)


class ClosedForm(Activation):
    """An activation whose gradient `train/gradients.py` needs no autograd for."""

    @abstractmethod
    def in_training_(self, pre_BF: "torch.Tensor") -> "torch.Tensor":
        """`in_training`, written over its argument."""

    @abstractmethod
    def backward_(self, gradient_BF: "torch.Tensor", f_BF: "torch.Tensor") -> None:
        """Turn the gradient of the latents `f_BF` into that of their pre-activations, in place."""


class ReLU(ClosedForm):
    """max(0, x)."""

    architecture = "standard"
    in_saelens = True

    def __call__(self, pre_BF: "torch.Tensor") -> "torch.Tensor":
        """Latents of a finished SAE."""
        return pre_BF.relu()

    def in_training_(self, pre_BF: "torch.Tensor") -> "torch.Tensor":
        """`in_training`, written over its argument."""
        return pre_BF.relu_()

    def backward_(self, gradient_BF: "torch.Tensor", f_BF: "torch.Tensor") -> None:
        """Zero the gradient where the latent does not fire, by ReLU's backward kernel: one pass over memory."""
        import torch

        torch.ops.aten.threshold_backward.grad_input(gradient_BF, f_BF, 0, grad_input=gradient_BF)


RELU = ReLU()
ACTIVATIONS: dict[str, Activation] = {"relu": RELU}
"""The values of `train.activation`."""


def known_activation(name: str) -> str:
    """The name itself. Raises ValueError for one that is not in ACTIVATIONS."""
    if name not in ACTIVATIONS:
        raise ValueError(f"should be one of {', '.join(map(repr, ACTIVATIONS))}, got {name!r}")
    return name
