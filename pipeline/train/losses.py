"""The loss by its definition, term by term, differentiated by autograd (docs/method.md, "The loss").

Training takes its gradients from `pipeline.train.gradients`, which computes the same in closed form and is tested against
this module. Only the literal formula is trained from here.

Shapes: B rows, D d_in, F d_sae.
"""

from dataclasses import dataclass

import torch

from pipeline.study.recipe import Contrast
from pipeline.train.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Pass:
    """What one batch says about one set of weights: the terms of the loss and the gradient of their sum."""

    gradient: Weights
    reconstruction: torch.Tensor
    sparsity: torch.Tensor
    contrast: torch.Tensor | None
    """None where the term was not computed."""
    residual_BD: torch.Tensor
    """x^ - x, times a positive number that is the same for all rows."""
    firings_F: torch.Tensor
    """Number of rows on which each latent fires."""


def reconstruction(x_BD: torch.Tensor, reconstructed_BD: torch.Tensor) -> torch.Tensor:
    """mean_b ||x_b - x^_b||^2; 1 is the mean square norm of a row."""
    return (x_BD - reconstructed_BD).square().sum(dim=1).mean()


def sparsity(f_BF: torch.Tensor, norm_F: torch.Tensor) -> torch.Tensor:
    """mean_b sum_i f_bi ||w_i||. The gradient reaches the norms: otherwise growing them would be a way to pay less."""
    return (f_BF * norm_F).sum(dim=1).mean()


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
    # S_ij and S_ji may round differently; comparing both with min(t_i, t_j) would select some pairs by one half only.
    return {"row": row_FF, "union": row_FF | row_FF.T, "mutual": row_FF & row_FF.T}[select]


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
    selected_FF = similarity_FF * pair_mask(similarity_FF.detach(), config.topk, config.select)
    if not config.weighted:
        return selected_FF.sum() / (2 * latents)
    return (selected_FF * (strength_BF.T @ strength_BF)).sum() / (2 * rows)


def literal_contrastive(f_BF: torch.Tensor, W_dec_FD: torch.Tensor, config: Contrast) -> torch.Tensor:
    """The penalty as it was first written down: sum_b sum_ij M_ij C_ij f_bi f_bj.

    Summed over rows and ordered pairs, the diagonal included in the mask (its cosine is the largest of every row) and in
    the sum.
    """
    direction_FD = torch.nn.functional.normalize(W_dec_FD, dim=1)
    cosine_FF = direction_FD @ direction_FD.T
    k = max(1, int(config.topk * len(cosine_FF)))
    row_FF = (cosine_FF >= cosine_FF.topk(k, dim=1).values[:, -1:]).detach()
    return ((row_FF | row_FF.T) * cosine_FF * (f_BF.T @ f_BF)).sum()


def differentiated(weights: Weights, x_BD: torch.Tensor, *, l1: float, contrast: Contrast | None, weight: float) -> Pass:
    """The loss of a batch and its gradient by autograd; `l1` and `weight` multiply the second and third term."""
    leaves = Weights(**{name: tensor.detach().requires_grad_() for name, tensor in weights.named()})
    with torch.enable_grad():
        norm_F = leaves.W_dec_FD.norm(dim=1)
        encoded_BF = (x_BD - leaves.b_dec_D) @ leaves.W_enc_DF
        if contrast and contrast.literal:
            encoded_BF = encoded_BF * norm_F
        f_BF = torch.relu(encoded_BF + leaves.b_enc_F)
        reconstructed_BD = f_BF @ leaves.W_dec_FD + leaves.b_dec_D
        terms = [reconstruction(x_BD, reconstructed_BD), sparsity(f_BF, norm_F)]
        loss = terms[0] + l1 * terms[1]
        if contrast:
            terms.append((literal_contrastive if contrast.literal else contrastive)(f_BF, leaves.W_dec_FD, contrast))
            loss = loss + weight * terms[2]
        gradients = torch.autograd.grad(loss, leaves.tensors())
    return Pass(
        gradient=Weights(**dict(zip((name for name, _ in leaves.named()), gradients, strict=True))),
        reconstruction=terms[0].detach(),
        sparsity=terms[1].detach(),
        contrast=terms[2].detach() if contrast else None,
        residual_BD=(reconstructed_BD - x_BD).detach(),
        firings_F=(f_BF.detach() > 0).sum(dim=0),
    )
