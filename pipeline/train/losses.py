"""The loss by its definition: a sum of named terms, differentiated by autograd (docs/method.md, "The loss").

Training takes its gradients from `train/gradients.py`, which computes the same in closed form and is tested against this
module. What has no closed form, such as the literal penalty, is trained from here.
"""

from dataclasses import dataclass

import torch

from pipeline.runtime.linalg import vector_norm
from pipeline.sae.activation import Trainable
from pipeline.train.auxk import AuxKTerm, auxk
from pipeline.train.penalty import PenaltyTerm
from pipeline.train.weights import Weights


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss of one step: reconstruction + l1 * sparsity + weight * penalty."""

    activation: Trainable
    l1: float
    penalty: PenaltyTerm | None = None
    """None for an arm without a penalty, and on a step that leaves it out."""
    weight: float = 0.0
    auxk: AuxKTerm | None = None
    """For dead latents, if there are any."""
    prefixes: tuple[int, ...] = ()
    """Of a Matryoshka SAE: the first so many latents each reconstruct alone, and the mean of their errors is the term."""

    def blocks(self, d_sae: int) -> list[slice]:
        """The latents that each prefix adds to the one before; all of them without prefixes."""
        ends = self.prefixes or (d_sae,)
        return [slice(first, last) for first, last in zip((0, *ends[:-1]), ends, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Differentiated:
    """The terms of the loss on one batch, and the gradient of their weighted sum."""

    gradient: Weights
    terms: dict[str, torch.Tensor]
    """Each term by name, unweighted: `reconstruction`, `sparsity`, and the penalty's where it was computed.

    With prefixes the loss has `prefixes` in place of `reconstruction`, which is that of all latents.
    """
    residual_BD: torch.Tensor
    """x^ - x, up to a positive factor that is the same for all rows: resets need no more."""
    firings_F: torch.Tensor
    """Number of rows on which each latent fires."""


def reconstruction(x_BD: torch.Tensor, reconstructed_BD: torch.Tensor) -> torch.Tensor:
    """mean_b ||x_b - x^_b||^2; 1 is the mean square norm of a row."""
    return (x_BD - reconstructed_BD).square().sum(dim=1).mean()


def prefix_reconstruction(
    x_BD: torch.Tensor, f_BF: torch.Tensor, weights: Weights, prefixes: tuple[int, ...]
) -> torch.Tensor:
    """Mean over prefixes of the reconstruction from their latents alone (Bussmann et al. 2025, arXiv 2503.17547)."""
    errors = [reconstruction(x_BD, f_BF[:, :end] @ weights.W_dec_FD[:end] + weights.b_dec_D) for end in prefixes]
    return torch.stack(errors).mean()


def pre_activations(weights: Weights, x_BD: torch.Tensor, scale_F: torch.Tensor | None) -> torch.Tensor:
    """The arguments [B, F] of the activation; `scale_F` is `PenaltyTerm.encoder_scale`."""
    encoded_BF = (x_BD - weights.b_dec_D) @ weights.W_enc_DF
    return (encoded_BF if scale_F is None else encoded_BF * scale_F) + weights.b_enc_F


def differentiated(weights: Weights, x_BD: torch.Tensor, objective: Objective) -> Differentiated:
    """The loss of a batch and its gradient by autograd."""
    leaves = Weights(**{name: tensor.detach().requires_grad_() for name, tensor in weights.named()})
    penalty, activation = objective.penalty, objective.activation.with_thresholds(leaves.threshold_F)
    with torch.enable_grad():
        norm_F = vector_norm(leaves.W_dec_FD, dim=1)
        pre_BF = pre_activations(leaves, x_BD, penalty.encoder_scale(norm_F) if penalty else None)
        f_BF = activation.in_training(pre_BF, norm_F)
        activation.observe(f_BF.detach(), norm_F.detach())
        reconstructed_BD = f_BF @ leaves.W_dec_FD + leaves.b_dec_D
        terms = {
            "reconstruction": reconstruction(x_BD, reconstructed_BD),
            "sparsity": activation.sparsity(pre_BF, f_BF, norm_F),
        }
        fidelity = terms["reconstruction"]
        if objective.prefixes:
            fidelity = terms["prefixes"] = prefix_reconstruction(x_BD, f_BF, leaves, objective.prefixes)
        loss = fidelity + objective.l1 * terms["sparsity"]
        if penalty:
            terms[penalty.name] = penalty.definition(f_BF, leaves.W_dec_FD)
            loss = loss + objective.weight * terms[penalty.name]
        if objective.auxk:
            dead_k = (objective.auxk.dead_F & ~(f_BF > 0).any(dim=0)).nonzero().squeeze(1)
            residual_BD = (x_BD - reconstructed_BD).detach()
            terms["auxk"] = auxk(objective.auxk, pre_BF[:, dead_k], leaves.W_dec_FD[dead_k], residual_BD)
            loss = loss + objective.auxk.weight * terms["auxk"]
        gradients = torch.autograd.grad(loss, leaves.tensors())
    return Differentiated(
        gradient=Weights(**dict(zip((name for name, _ in leaves.named()), gradients, strict=True))),
        terms={name: term.detach() for name, term in terms.items()},
        residual_BD=(reconstructed_BD - x_BD).detach(),
        firings_F=(f_BF.detach() > 0).sum(dim=0),
    )
