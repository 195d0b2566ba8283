"""The penalties of C2R and of OrtSAE, on each latent's nearest neighbour in the decoder (docs/method.md, "Rivals").

Both cut the latents into chunks at random, and look for the neighbour inside the chunk. Which it is counts as a constant.
Local shape: c latents of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pipeline.runtime.linalg import vecdot, vector_norm
from pipeline.study.penalties import C2R, Orthogonality
from pipeline.train.penalty import PenaltyTerm
from pipeline.train.weights import Weights

PANEL = 512
"""Latents whose cosines to their whole chunk are held at once: 17 MB for a chunk of 8,192."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Latents, their nearest neighbours among each other, and relu(C)^2 of the two."""

    latent_c: torch.Tensor
    nearest_c: torch.Tensor
    square_c: torch.Tensor


class NearestTerm(PenaltyTerm):
    """What the two have in common: the chunks, and the neighbours in them."""

    def __init__(self, section: C2R | Orthogonality, weights: Weights):
        super().__init__(section, weights)
        # The same chunks for every SAE: they belong to the method, not to what a seed varies.
        self.generator = torch.Generator().manual_seed(0)
        self.latents: list[torch.Tensor] = []
        """The latents of each chunk."""

    def prepare(self, done: int) -> None:  # noqa: ARG002 - drawn anew for every step that computes the penalty
        """Draw the chunks. A chunk of one latent, which has no neighbour, is left out."""
        d_sae, device = self.weights.W_dec_FD.shape[0], self.weights.W_dec_FD.device
        chunk: int = self.section.chunk
        order = torch.arange(d_sae) if d_sae <= chunk else torch.randperm(d_sae, generator=self.generator)
        parts: tuple[torch.Tensor, ...] = torch.split(order.to(device), chunk)
        self.latents = [part for part in parts if len(part) > 1]

    def state(self) -> dict[str, torch.Tensor]:
        """The generator of the chunks."""
        return {"chunks": self.generator.get_state()}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        """Take over what `state()` returned."""
        self.generator.set_state(state["chunks"].cpu())

    def neighbours(self, W_dec_FD: torch.Tensor) -> Iterator[Chunk]:
        """The chunks. Gradients reach the cosines."""
        direction_FD = W_dec_FD / vector_norm(W_dec_FD, dim=1, keepdim=True).clamp_min(torch.finfo(W_dec_FD.dtype).tiny)
        for latent_c in self.latents:
            nearest_c = latent_c[_nearest(direction_FD.detach()[latent_c])]
            cosine_c = vecdot(direction_FD[latent_c], direction_FD[nearest_c])
            yield Chunk(latent_c=latent_c, nearest_c=nearest_c, square_c=cosine_c.relu().square())


class C2RTerm(NearestTerm):
    """1/F sum_i relu(max_j C_ij)^2 (n_i + n_j)^alpha; n_i is the norm of f_i ||w_i|| over the batch, summed, not averaged.

    Jin et al., "Cross-sample Consistency Regularization" (ICML 2026, arXiv 2606.30609).
    """

    name = "c2r"
    section: C2R

    def definition(self, f_BF: torch.Tensor, W_dec_FD: torch.Tensor) -> torch.Tensor:
        """The penalty on a batch, a scalar."""
        strength_F = vector_norm(f_BF, dim=0) * vector_norm(W_dec_FD, dim=1)
        total = f_BF.new_zeros(())
        for chunk in self.neighbours(W_dec_FD):
            # The clamp keeps the gradient finite where neither fires and alpha is below 1.
            both_c = (strength_F[chunk.latent_c] + strength_F[chunk.nearest_c]).clamp_min(1e-12)
            total = total + (chunk.square_c * both_c**self.section.alpha).sum()
        return total / f_BF.shape[1]


class OrthogonalityTerm(NearestTerm):
    """mean over chunks of mean_i relu(max_j C_ij)^2, whether or not the latents fire.

    Korznikov et al., "OrtSAE: Orthogonal Sparse Autoencoders" (arXiv 2509.22033).
    """

    name = "orthogonality"
    section: Orthogonality

    def definition(self, f_BF: torch.Tensor, W_dec_FD: torch.Tensor) -> torch.Tensor:
        """The penalty on a batch, a scalar; the latents do not enter."""
        means = [chunk.square_c.mean() for chunk in self.neighbours(W_dec_FD)]
        return torch.stack(means).mean() + 0 * f_BF.sum()


def _nearest(direction_cD: torch.Tensor) -> torch.Tensor:
    """For each direction the index of the one with the largest cosine to it, itself left out."""
    found: list[torch.Tensor] = []
    for start in range(0, len(direction_cD), PANEL):
        cosine = direction_cD[start : start + PANEL] @ direction_cD.T
        cosine.diagonal(offset=start).fill_(-torch.inf)
        found.append(cosine.argmax(dim=1))
    return torch.cat(found)
