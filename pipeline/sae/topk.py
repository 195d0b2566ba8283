"""Activations that keep the strongest latents: k of each row, or k a row on average over a batch.

How strong a latent is says a = f ||w||, which does not change when a norm moves between encoder and decoder.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.sae.activation import Activation, ClosedForm, Wanted
from pipeline.sae.jumprelu import JumpReLU

if TYPE_CHECKING:
    import torch

MOMENTUM = 0.99
"""Of the average of BatchTopK's threshold, as in SAELens."""
MARGIN = 0.8
"""Share of the last bound above which the next is looked for first. It decides how long that takes, not what is found."""


class Selecting(ClosedForm):
    """Keeps latents from a bound on; the gradient passes where a latent is kept."""

    fixes_l0: ClassVar[bool] = True

    def in_training(self, pre_BF: "torch.Tensor", norm_F: "torch.Tensor") -> "torch.Tensor":
        """Latents while training, differentiable."""
        return pre_BF * (self.in_training_(pre_BF.detach().clone(), norm_F.detach()) > 0)


@dataclass(frozen=True)
class TopK(Selecting, Activation):
    """The k strongest of each row, of those above 0 (Gao et al. 2024, arXiv 2406.04093, section 2.3)."""

    architecture: ClassVar[str] = "topk"
    in_saelens: ClassVar[bool] = True
    k: int = 0

    def for_training(self, recipe: Wanted) -> "TopK":
        """With its k."""
        assert recipe.k is not None
        return TopK(recipe.k)

    def __call__(self, pre_BF: "torch.Tensor") -> "torch.Tensor":
        """Latents of a finished SAE, whose decoder rows have norm 1."""
        f_BF = pre_BF.relu()
        return self._kept_(f_BF, f_BF)

    def in_training_(self, pre_BF: "torch.Tensor", norm_F: "torch.Tensor") -> "torch.Tensor":
        """`in_training`, in place: the result overwrites the argument."""
        return self._kept_(pre_BF.relu_(), pre_BF * norm_F)

    def bias(self, projection: float, like_F: "torch.Tensor") -> "torch.Tensor":  # noqa: ARG002 - k decides, not a bound
        """No bias."""
        return like_F.new_zeros(like_F.shape)

    def _kept_(self, f_BF: "torch.Tensor", strength_BF: "torch.Tensor") -> "torch.Tensor":
        strongest_Bk = strength_BF.topk(min(self.k, f_BF.shape[-1]), dim=-1, sorted=False).indices
        kept_Bk = f_BF.gather(-1, strongest_Bk)
        return f_BF.zero_().scatter_(-1, strongest_Bk, kept_Bk)

    def config(self) -> dict[str, Any]:
        """What `cfg.json` says of its parameters."""
        return {"k": self.k, "rescale_acts_by_decoder_norm": False}

    def read(self, config: dict[str, Any], tensors: "dict[str, torch.Tensor]") -> "TopK":  # noqa: ARG002 - it has none
        """The activation that `config()` describes."""
        return TopK(int(config["k"]))


class BatchTopK(Selecting):
    """The k B strongest of a batch of B rows, of those above 0 (Bussmann et al. 2024, arXiv 2412.06410).

    A finished SAE must not depend on other rows: it is a JumpReLU, with the moving average of the smallest strength kept.
    """

    architecture = JumpReLU.architecture
    in_saelens = True

    def __init__(self, k: int = 0):
        self.k = k
        self.average: torch.Tensor | None = None
        """Moving average of the smallest strength that was kept; None before the first step."""
        self._last = 0.0
        """The bound of the last batch."""

    def for_training(self, recipe: Wanted) -> "BatchTopK":
        """With its k, and an average of its own."""
        assert recipe.k is not None
        return BatchTopK(recipe.k)

    def in_training_(self, pre_BF: "torch.Tensor", norm_F: "torch.Tensor") -> "torch.Tensor":
        """`in_training`, in place: the result overwrites the argument."""
        import torch

        strength_BF = pre_BF.relu_() * norm_F
        bound = largest(strength_BF, self.k * len(pre_BF), MARGIN * self._last)
        self._last = float(bound)
        below = torch.nextafter(bound, -torch.ones_like(bound)).item()  # the next line keeps what is above, not the bound
        return torch.ops.aten.threshold_backward.grad_input(pre_BF, strength_BF, below, grad_input=pre_BF)

    def observe(self, f_BF: "torch.Tensor", norm_F: "torch.Tensor") -> None:
        """Take the smallest strength of the latents kept into the average."""
        kept = (f_BF * norm_F)[f_BF > 0] if not self._last else f_BF.new_full((1,), self._last)
        if len(kept):
            smallest = kept.min()
            self.average = smallest if self.average is None else MOMENTUM * self.average + (1 - MOMENTUM) * smallest

    def read(self, config: dict[str, Any], tensors: "dict[str, torch.Tensor]") -> JumpReLU:  # noqa: ARG002 - says nothing
        """The finished activation, with these thresholds."""
        return JumpReLU(tensors["threshold"])

    def finished(self, norm_F: "torch.Tensor") -> JumpReLU:
        """With the average as the threshold of every latent's strength."""
        threshold_F = norm_F.new_zeros(norm_F.shape) if self.average is None else self.average / norm_F
        return JumpReLU(threshold_F)

    def state(self) -> "dict[str, torch.Tensor]":
        """The average."""
        return {} if self.average is None else {"smallest": self.average}

    def load_state(self, state: "dict[str, torch.Tensor]") -> None:
        """Take over what `state()` returned."""
        self.average = state.get("smallest")


def largest(values: "torch.Tensor", count: int, guess: float) -> "torch.Tensor":
    """The `count`-th largest of the values above 0, which must not be negative; 0 if there are fewer.

    Only the values above `guess` are searched, unless they are too few.
    """
    found = values[values > guess]
    if len(found) < count and guess > 0:
        found = values[values > 0]
    if len(found) < count:
        return values.new_zeros(())
    return found.kthvalue(len(found) - count + 1).values
