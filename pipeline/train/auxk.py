"""AuxK: dead latents reconstruct what the others leave, so that they come back (Gao et al. 2024, arXiv 2406.04093, 2.4).

Local shape: k dead latents.
"""

from dataclasses import dataclass

import torch

from pipeline.runtime.linalg import vector_norm
from pipeline.sae.topk import TopK


@dataclass(frozen=True, kw_only=True)
class AuxKTerm:
    """The term of one step: its weight, the most latents on a row, and those that count as dead before the step."""

    weight: float
    kept: int
    dead_F: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class AuxKGradient:
    """The term, the latents that are dead, and the gradient of the weighted term for them."""

    term: torch.Tensor
    latent_k: torch.Tensor
    pre_Bk: torch.Tensor
    W_dec_kD: torch.Tensor


def auxk(term: AuxKTerm, pre_Bk: torch.Tensor, W_dec_kD: torch.Tensor, residual_BD: torch.Tensor) -> torch.Tensor:
    """mean_b ||e_b - e^_b||^2 over the variance of e: how well the dead latents alone reconstruct the residual e = x - x^.

    e and the bias count as constants. 0 where e has no variance, as in `dictionary_learning`, and without dead latents.
    """
    if not pre_Bk.shape[1]:
        return pre_Bk.sum()
    f_Bk = TopK(term.kept).in_training(pre_Bk, vector_norm(W_dec_kD.detach(), dim=1))
    error = (residual_BD - f_Bk @ W_dec_kD).square().sum(dim=1).mean()
    variance = (residual_BD - residual_BD.mean(dim=0)).square().sum(dim=1).mean()
    return (error / variance).nan_to_num(0.0)


def differentiated(
    term: AuxKTerm, pre_Bk: torch.Tensor, firings_F: torch.Tensor, W_dec_FD: torch.Tensor, residual_BD: torch.Tensor
) -> AuxKGradient:
    """The term and its gradient by autograd, which concerns few latents.

    `pre_Bk` is of the latents of `term.dead_F`. Of these, the ones that fire on this batch are dead no longer.
    """
    still = firings_F[term.dead_F] == 0
    latent_k = term.dead_F.nonzero().squeeze(1)[still]
    leaves = pre_Bk[:, still].detach().requires_grad_(), W_dec_FD[latent_k].detach().requires_grad_()
    with torch.enable_grad():
        value = auxk(term, *leaves, residual_BD)
        gradients = torch.autograd.grad(term.weight * value, leaves, materialize_grads=True)
    return AuxKGradient(term=value.detach(), latent_k=latent_k, pre_Bk=gradients[0], W_dec_kD=gradients[1])
