"""JumpReLU: latents above a threshold of their own, which is learned or follows from another activation's training."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.sae.activation import Activation, Trainable, Wanted
from pipeline.sae.jump_section import Jump

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class JumpReLU(Activation):
    """x where it is above 0 and above the latent's threshold, else 0 (Rajamanoharan et al. 2024, arXiv 2407.14435)."""

    architecture: ClassVar[str] = "jumprelu"
    in_saelens: ClassVar[bool] = True
    threshold_F: "torch.Tensor"

    def __call__(self, pre_BF: "torch.Tensor") -> "torch.Tensor":
        """Latents of a finished SAE."""
        return pre_BF.relu() * (pre_BF > self.threshold_F)

    def scaled(self, factor_F: "torch.Tensor") -> "JumpReLU":
        """Thresholds are in the unit of the pre-activations."""
        return JumpReLU(self.threshold_F * factor_F)

    def bias(self, projection: float, like_F: "torch.Tensor") -> "torch.Tensor":  # noqa: ARG002 - the thresholds have its shape
        """Biases that make up for the thresholds."""
        return self.threshold_F - projection

    def to(self, device: "torch.device") -> "JumpReLU":
        """The same with its thresholds on a device."""
        return JumpReLU(self.threshold_F.to(device))

    def tensors(self) -> "dict[str, torch.Tensor]":
        """Its thresholds."""
        return {"threshold": self.threshold_F}


@dataclass(frozen=True, eq=False)
class LearnedJumpReLU(Trainable):
    """JumpReLU whose thresholds are learned by a straight-through estimate of their gradient (section 4 there).

    The estimate looks at latents within half a bandwidth of their threshold. It reaches the thresholds alone, as there.
    """

    architecture: ClassVar[str] = JumpReLU.architecture
    in_saelens: ClassVar[bool] = True
    options: Jump = field(default_factory=Jump)
    l0_target: float | None = None
    threshold_F: "torch.Tensor | None" = None

    @property
    def first_threshold(self) -> float:
        """Where the thresholds of latents begin."""
        return self.options.threshold

    def for_training(self, recipe: Wanted) -> "LearnedJumpReLU":
        """With its options."""
        return LearnedJumpReLU(recipe.jumprelu or Jump(), recipe.l0_target)

    def with_thresholds(self, threshold_F: "torch.Tensor | None") -> "LearnedJumpReLU":
        """The same with the thresholds that the SAE has learned so far."""
        return replace(self, threshold_F=threshold_F)

    def in_training(self, pre_BF: "torch.Tensor", norm_F: "torch.Tensor") -> "torch.Tensor":  # noqa: ARG002 - all alike
        """Latents while training, differentiable."""
        threshold_F = self._thresholds()
        # As the threshold is never below 0, neither is a latent.
        kept_BF = pre_BF * (pre_BF > threshold_F)
        return kept_BF + self._straight_through(pre_BF, threshold_F.detach() * threshold_F)

    def sparsity(self, pre_BF: "torch.Tensor", f_BF: "torch.Tensor", norm_F: "torch.Tensor") -> "torch.Tensor":
        """mean_b L0_b, mean_b sum_i tanh(c f_bi ||w_i||), or (mean_b L0_b / target - 1)^2."""
        if self.options.sparsity == "tanh":
            return (self.options.tanh_scale * f_BF * norm_F).tanh().sum(dim=1).mean()
        threshold_F = self._thresholds()
        fires_BF = (pre_BF > threshold_F).to(pre_BF) + self._straight_through(pre_BF, threshold_F)
        l0 = fires_BF.sum(dim=1).mean()
        if self.options.sparsity == "step":
            return l0
        assert self.l0_target is not None
        return (l0 / self.l0_target - 1).square()

    def finished(self, norm_F: "torch.Tensor") -> JumpReLU:  # noqa: ARG002 - thresholds are in the unit of pre-activations
        """With the thresholds that were learned."""
        return JumpReLU(self._thresholds())

    def read(self, config: dict[str, Any], tensors: "dict[str, torch.Tensor]") -> JumpReLU:  # noqa: ARG002 - says nothing
        """The finished activation, with these thresholds."""
        return JumpReLU(tensors["threshold"])

    def _straight_through(self, pre_BF: "torch.Tensor", moved_F: "torch.Tensor") -> "torch.Tensor":
        """0, whose gradient with respect to `moved_F` is -1 over the bandwidth for each latent near its threshold."""
        near_BF = ((pre_BF - self._thresholds()).detach() / self.options.bandwidth).abs() < 0.5
        return near_BF * ((moved_F.detach() - moved_F) / self.options.bandwidth)

    def _thresholds(self) -> "torch.Tensor":
        assert self.threshold_F is not None, "with_thresholds comes first"
        return self.threshold_F
