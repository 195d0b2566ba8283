"""The activation of gated SAEs, which are read and evaluated here and not trained."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.sae.activation import Activation
from pipeline.sae.activations import RELU

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Gated(Activation):
    """Where the pre-activation is above 0, a second one of the same direction, with its own scale and bias, above 0.

    Rajamanoharan et al. 2024 (arXiv 2404.16014), equations 6 to 8: the pre-activation pi_gate has the bias b_gate, and
    f = 1[pi_gate > 0] relu((pi_gate - b_gate) exp(r_mag) + b_mag).
    """

    architecture: ClassVar[str] = "gated"
    in_saelens: ClassVar[bool] = True
    bias_tensor: ClassVar[str] = "b_gate"
    b_gate_F: "torch.Tensor"
    """The encoder's bias."""
    r_mag_F: "torch.Tensor"
    b_mag_F: "torch.Tensor"

    def __call__(self, pre_BF: "torch.Tensor") -> "torch.Tensor":
        """Latents of a finished SAE."""
        return ((pre_BF - self.b_gate_F) * self.r_mag_F.exp() + self.b_mag_F).relu() * (pre_BF > 0)

    @classmethod
    def of(cls, _: dict[str, Any], tensors: "dict[str, torch.Tensor]") -> "Gated":
        """From an SAE's tensors. Raises KeyError where one is missing."""
        return cls(tensors["b_gate"], tensors["r_mag"], tensors["b_mag"])

    def scaled(self, factor_F: "torch.Tensor") -> "Gated":
        """Biases are in the unit of the pre-activations."""
        return Gated(self.b_gate_F * factor_F, self.r_mag_F, self.b_mag_F * factor_F)

    def untrained(self) -> Activation:
        """Both biases belong to the directions of this SAE. Without them a gate is a ReLU."""
        return RELU

    def to(self, device: "torch.device") -> "Gated":
        """The same on a device."""
        return Gated(self.b_gate_F.to(device), self.r_mag_F.to(device), self.b_mag_F.to(device))

    def tensors(self) -> "dict[str, torch.Tensor]":
        """What it has beside the encoder's bias."""
        return {"r_mag": self.r_mag_F, "b_mag": self.b_mag_F}
