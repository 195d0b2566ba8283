"""The table of activation functions of SAEs: each in training, in a finished SAE, and by its name in SAELens.

Training, evaluation, the training log, the random null and the export all use an entry of ACTIVATIONS. torch is imported
only when one is called, because an experiment that names an activation must be validated without torch.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch


class Activation(ABC):
    """Maps pre-activations [B, F] to latents [B, F]. A latent fires where it is above 0.

    It must satisfy a(c x) = c a(x) for c > 0: `SAE.folded` folds decoder norms into the encoder.
    """

    architecture: ClassVar[str]
    """What `cfg.json` calls an SAE with this activation."""
    in_saelens: ClassVar[bool] = False
    """Whether SAELens has the same function under that name. Without it, an SAE cannot be exported."""

    @abstractmethod
    def __call__(self, pre_BF: "torch.Tensor") -> "torch.Tensor":
        """Latents of a finished SAE."""

    def in_training(self, pre_BF: "torch.Tensor") -> "torch.Tensor":
        """Latents while training, differentiable. By default those of a finished SAE."""
        return self(pre_BF)


class ClosedForm(Activation):
    """An activation with its backward pass in closed form, so that `pipeline.train.gradients` needs no autograd."""

    @abstractmethod
    def in_training_(self, pre_BF: "torch.Tensor") -> "torch.Tensor":
        """`in_training`, in place: the result overwrites the argument."""

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
        """`in_training`, in place: the result overwrites the argument."""
        return pre_BF.relu_()

    def backward_(self, gradient_BF: "torch.Tensor", f_BF: "torch.Tensor") -> None:
        """Zero the gradient where the latent does not fire, by ReLU's backward kernel: one pass over memory."""
        import torch

        torch.ops.aten.threshold_backward.grad_input(gradient_BF, f_BF, 0, grad_input=gradient_BF)


RELU = ReLU()
ACTIVATIONS: dict[str, Activation] = {"relu": RELU}
"""By the value of `train.activation`."""
