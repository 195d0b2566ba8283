"""The table of activation functions of SAEs.

Training, evaluation, the training log, the random null and the export all use an entry of ACTIVATIONS.
"""

from typing import TYPE_CHECKING

from pipeline.sae.activation import Activation, ClosedForm, Trainable
from pipeline.sae.jumprelu import LearnedJumpReLU
from pipeline.sae.topk import BatchTopK, TopK

if TYPE_CHECKING:
    import torch


class ReLU(ClosedForm, Activation):
    """max(0, x)."""

    architecture = "standard"
    in_saelens = True
    compiles = True

    def __call__(self, pre_BF: "torch.Tensor") -> "torch.Tensor":
        """Latents of a finished SAE."""
        return pre_BF.relu()

    def in_training_(self, pre_BF: "torch.Tensor", norm_F: "torch.Tensor") -> "torch.Tensor":  # noqa: ARG002 - all alike
        """`in_training`, in place: the result overwrites the argument."""
        return pre_BF.relu_()


RELU = ReLU()
ACTIVATIONS: dict[str, Trainable] = {"relu": RELU, "topk": TopK(), "batchtopk": BatchTopK(), "jumprelu": LearnedJumpReLU()}
"""By the value of `train.activation`."""
