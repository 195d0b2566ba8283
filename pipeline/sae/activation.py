"""Defines what an activation function of SAEs is: while an SAE trains, and in a finished one and its files.

torch is imported only when one is called, because an experiment that names an activation must be validated without torch.
"""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

if TYPE_CHECKING:
    import torch

    from pipeline.sae.jump_section import Jump


class Wanted(Protocol):
    """What activations read of a recipe."""

    @property
    def k(self) -> int | None:
        """Latents that fire on a row."""
        ...

    @property
    def l0_target(self) -> float | None:
        """The L0 that training steers to."""
        ...

    @property
    def jumprelu(self) -> "Jump | None":
        """Options of JumpReLU."""
        ...


class Trainable(ABC):
    """Maps pre-activations [B, F] of an SAE in training to latents [B, F]. A latent fires where it is above 0."""

    architecture: ClassVar[str]
    """What `cfg.json` calls a finished SAE with this activation."""
    in_saelens: ClassVar[bool] = False
    """Whether SAELens has the same function under that name. Without it, an SAE cannot be exported."""
    bias_tensor: ClassVar[str] = "b_enc"
    """What `sae_weights.safetensors` calls the encoder's bias."""
    fixes_l0: ClassVar[bool] = False
    """Whether `train.k` says how many latents fire, so that no sparsity term is needed."""

    @property
    def first_threshold(self) -> float | None:
        """Where the thresholds of latents begin, for an activation that learns them."""
        return None

    @abstractmethod
    def in_training(self, pre_BF: "torch.Tensor", norm_F: "torch.Tensor") -> "torch.Tensor":
        """Latents while training, differentiable. `norm_F`: norms of the decoder rows."""

    @abstractmethod
    def finished(self, norm_F: "torch.Tensor") -> "Activation":
        """The activation of the finished SAE, before norms are folded."""

    @abstractmethod
    def read(self, config: dict[str, Any], tensors: "dict[str, torch.Tensor]") -> "Activation":
        """The finished activation with these `config()` and `tensors()`. Raises ValueError or KeyError for no such thing."""

    def for_training(self, recipe: Wanted) -> "Trainable":  # noqa: ARG002 - for subclasses
        """The activation of one SAE in training, which may have state of its own."""
        return self

    def with_thresholds(self, threshold_F: "torch.Tensor | None") -> "Trainable":  # noqa: ARG002 - for subclasses
        """The same with the thresholds that the SAE has learned so far."""
        return self

    def sparsity(self, pre_BF: "torch.Tensor", f_BF: "torch.Tensor", norm_F: "torch.Tensor") -> "torch.Tensor":  # noqa: ARG002
        """The sparsity term, differentiable: mean_b sum_i f_bi ||w_i||.

        The gradient reaches the norms: otherwise growing them would lower the term for free.
        """
        return (f_BF * norm_F).sum(dim=1).mean()

    def observe(self, f_BF: "torch.Tensor", norm_F: "torch.Tensor") -> None:  # noqa: B027 - most learn nothing from them
        """Take note of the latents of a training step."""

    def state(self) -> "dict[str, torch.Tensor]":
        """All mutable state, by name."""
        return {}

    def load_state(self, state: "dict[str, torch.Tensor]") -> None:  # noqa: B027 - most keep nothing
        """Take over what `state()` returned. The argument also holds the entries of the `Trainer`."""


class Activation(Trainable):
    """The activation of a finished SAE; by default it is the same in training, and has no parameters.

    For c > 0, `scaled(c)` of c x is c times the latents of x, because `SAE.folded` folds decoder norms into the encoder. One
    without parameters is its own scaled form, so a(c x) = c a(x).
    """

    @abstractmethod
    def __call__(self, pre_BF: "torch.Tensor") -> "torch.Tensor":
        """Latents of a finished SAE."""

    def in_training(self, pre_BF: "torch.Tensor", norm_F: "torch.Tensor") -> "torch.Tensor":  # noqa: ARG002 - for subclasses
        """Latents while training, differentiable."""
        return self(pre_BF)

    def finished(self, norm_F: "torch.Tensor") -> "Activation":  # noqa: ARG002 - for subclasses
        """The activation of the finished SAE, before norms are folded."""
        return self

    def read(self, config: dict[str, Any], tensors: "dict[str, torch.Tensor]") -> "Activation":  # noqa: ARG002
        """The activation with these `config()` and `tensors()`."""
        return self

    def scaled(self, factor_F: "torch.Tensor") -> "Activation":  # noqa: ARG002 - for subclasses
        """The activation whose latents of pre-activations times `factor_F` are this one's times `factor_F`."""
        return self

    def untrained(self) -> "Activation":
        """The activation of random directions in this SAE's place: the same, without what belongs to its directions."""
        return self

    def bias(self, projection: float, like_F: "torch.Tensor") -> "torch.Tensor":
        """Biases [F] with which latents fire where their projection is above the given one, as far as that decides."""
        return like_F.new_full(like_F.shape, -projection)

    def to(self, device: "torch.device") -> "Activation":  # noqa: ARG002 - for subclasses
        """The same with its tensors on a device."""
        return self

    def config(self) -> dict[str, Any]:
        """What `cfg.json` says of its parameters."""
        return {}

    def tensors(self) -> "dict[str, torch.Tensor]":
        """Its tensors [F] in `sae_weights.safetensors`, by name."""
        return {}


class ClosedForm(Trainable):
    """Has its backward pass in closed form, so that `pipeline.train.gradients` needs no autograd."""

    compiles: ClassVar[bool] = False
    """Whether a GPU can compile and record `in_training_`: it neither waits for the device nor sorts."""

    @abstractmethod
    def in_training_(self, pre_BF: "torch.Tensor", norm_F: "torch.Tensor") -> "torch.Tensor":
        """`in_training`, in place: the result overwrites the argument."""

    def backward_(self, gradient_BF: "torch.Tensor", f_BF: "torch.Tensor") -> None:
        """Turn the gradient of the latents `f_BF` into that of their pre-activations, in place.

        By default it is zeroed where the latent does not fire, in one pass over memory, by ReLU's backward kernel.
        """
        import torch

        torch.ops.aten.threshold_backward.grad_input(gradient_BF, f_BF, 0, grad_input=gradient_BF)
