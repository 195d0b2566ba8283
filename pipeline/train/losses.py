"""The terms of the loss, each a pure function (docs/method.md, "The loss"). Autograd differentiates all of them.

Shapes: B rows, D d_in, F d_sae.
"""

import torch

from pipeline.experiment import Contrast


def reconstruction(x_BD: torch.Tensor, reconstructed_BD: torch.Tensor) -> torch.Tensor:
    """mean_b ||x_b - x^_b||^2; 1 is the mean square norm of a row."""
    return (x_BD - reconstructed_BD).square().sum(dim=1).mean()


def sparsity(f_BF: torch.Tensor, norm_F: torch.Tensor) -> torch.Tensor:
    """mean_b sum_i f_bi ||w_i||. The gradient reaches the norms: otherwise growing them would be a way to pay less."""
    return (f_BF * norm_F).sum(dim=1).mean()


def pair_mask(similarity_FF: torch.Tensor, topk: float) -> torch.Tensor:
    """Which ordered pairs count as pointing the same way: in the top-K of the row or of the column, never the diagonal.

    M_ij = [i != j] [S_ij >= min(t_i, t_j)] with t_i the k-th largest of {S_ij : j != i} and k = max(1, int(K (F - 1))).
    """
    latents = similarity_FF.shape[0]
    k = max(1, int(topk * (latents - 1)))
    others_FF = similarity_FF.clone().fill_diagonal_(-torch.inf)
    row_FF = others_FF >= others_FF.topk(k, dim=1).values[:, -1:]
    # S_ij and S_ji may round differently; comparing both with min(t_i, t_j) would select some pairs by one half only.
    return row_FF | row_FF.T


def contrastive(f_BF: torch.Tensor, W_dec_FD: torch.Tensor, config: Contrast) -> torch.Tensor:
    """The penalty on selected pairs, each unordered pair once, mean over rows.

    Weighted: 1/(2B) sum_b sum_ij M_ij S_ij a_bi a_bj. Unweighted: 1/(2F) sum_ij M_ij S_ij. The mask is a constant.
    `direction`: S is the cosine and a = f ||w|| with the norm detached, so only directions and latents are pushed.
    `magnitude`: S is the dot product and a = f, so the norms are pushed too. Under unit norms both are the same number.
    """
    rows, latents = f_BF.shape
    if config.by == "direction":
        norm_F = W_dec_FD.norm(dim=1)
        direction_FD = W_dec_FD / norm_F[:, None]
        similarity_FF, strength_BF = direction_FD @ direction_FD.T, f_BF * norm_F.detach()
    else:
        similarity_FF, strength_BF = W_dec_FD @ W_dec_FD.T, f_BF
    selected_FF = similarity_FF * pair_mask(similarity_FF.detach(), config.topk)
    if not config.weighted:
        return selected_FF.sum() / (2 * latents)
    return (selected_FF * (strength_BF.T @ strength_BF)).sum() / (2 * rows)
