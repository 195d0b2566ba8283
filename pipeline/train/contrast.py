"""The contrastive penalty on pairs of latents that point the same way and fire together (docs/method.md, "The loss")."""

import torch

from pipeline.runtime.compiled import Replayed
from pipeline.runtime.linalg import vector_norm
from pipeline.section import Dtype
from pipeline.study.penalties import Contrast
from pipeline.train import pair_kernels, pair_selection
from pipeline.train.penalty import Accumulator, Latents, PenaltyTerm
from pipeline.train.weights import Weights, decoder_norms


def pair_mask(similarity_FF: torch.Tensor, topk: float, select: str = "union") -> torch.Tensor:
    """Which ordered pairs count as pointing the same way: bool [F, F], never the diagonal.

    `row` selects (i, j) where S_ij is at least t_i, the k-th largest of {S_ij : j != i} with k = max(1, int(K (F - 1)));
    `union` where it is at least t_i or t_j, `mutual` where it is at least both.
    """
    latents = similarity_FF.shape[0]
    k = max(1, int(topk * (latents - 1)))
    others_FF = similarity_FF.clone().fill_diagonal_(-torch.inf)
    row_FF = others_FF >= others_FF.topk(k, dim=1).values[:, -1:]
    row_FF = row_FF.fill_diagonal_(False)
    # S_ij and S_ji may round differently; comparing both with min(t_i, t_j) would select only one half of some pairs.
    return {"row": row_FF, "union": row_FF | row_FF.T, "mutual": row_FF & row_FF.T}[select]


def contrastive(f_BF: torch.Tensor, W_dec_FD: torch.Tensor, config: Contrast) -> torch.Tensor:
    """The penalty on selected pairs, each unordered pair once, mean over rows.

    Weighted: 1/(2B) sum_b sum_ij M_ij S_ij a_bi a_bj. Unweighted: 1/(2F) sum_ij M_ij S_ij. The mask is a constant.
    `direction`: S is the cosine and a = f ||w|| with the norm detached, so only directions and latents are pushed.
    `magnitude`: S is the dot product and a = f, so the norms are pushed too. Under unit norms both are the same number.
    """
    rows, latents = f_BF.shape
    if config.by == "direction":
        norm_F = vector_norm(W_dec_FD, dim=1)
        direction_FD = W_dec_FD / norm_F[:, None]
        similarity_FF, strength_BF = direction_FD @ direction_FD.T, f_BF * norm_F.detach()
    else:
        similarity_FF, strength_BF = W_dec_FD @ W_dec_FD.T, f_BF
    selected_FF = similarity_FF * pair_mask(similarity_FF.detach(), config.topk, config.select)
    if not config.weighted:
        return selected_FF.sum() / (2 * latents)
    return (selected_FF * (strength_BF.T @ strength_BF)).sum() / (2 * rows)


class ContrastTerm(PenaltyTerm):
    """The penalty of one SAE, with the similarity thresholds it keeps between refreshes."""

    name = "contrast"
    recordable = True
    section: Contrast

    def __init__(self, section: Contrast, weights: Weights):
        super().__init__(section, weights)
        self.threshold_F = torch.zeros_like(weights.b_enc_F)
        """Per latent, the similarity to another at which their pair is selected: the k-th largest."""
        self._renew = Replayed()
        self.refreshed = -1
        """Steps taken when the thresholds were computed; -1 when they must be computed again."""

    @property
    def reads(self) -> Dtype:
        """The dtype of products of latents."""
        return self.section.precision

    def definition(self, f_BF: torch.Tensor, W_dec_FD: torch.Tensor) -> torch.Tensor:
        """The penalty on a batch, a scalar. It uses exact thresholds, not the kept ones."""
        return contrastive(f_BF, W_dec_FD, self.section)

    def add_gradient(self, latents: Latents, into: Accumulator) -> torch.Tensor:
        """Add the gradient to `into`, by the cheapest of `pair_kernels`; returns the penalty."""
        pairs = pair_selection.SelectedPairs(**vars(latents), threshold_F=self.threshold_F, config=self.section)
        return pair_kernels.penalty(pairs, into)

    def prepare(self, done: int) -> None:
        """Compute the thresholds again when they are due."""
        if self.refreshed < 0 or done - self.refreshed >= self.section.pair_refresh:
            self._renew(self._compute_thresholds, self.threshold_F.device)
            self.refreshed = done

    def _compute_thresholds(self) -> None:
        W_dec_FD = self.weights.W_dec_FD
        self.threshold_F.copy_(pair_selection.thresholds(W_dec_FD, decoder_norms(W_dec_FD), self.section)[0])

    def latents_were_reset(self) -> None:
        """Compute the thresholds again on the next step."""
        self.refreshed = -1

    def state(self) -> dict[str, torch.Tensor]:
        """All mutable state, by name."""
        return {"threshold_F": self.threshold_F, "refreshed": torch.tensor(self.refreshed)}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state()` returned. The argument also holds the entries of the `Trainer`."""
        self.threshold_F.copy_(state["threshold_F"])
        self.refreshed = int(state["refreshed"])
