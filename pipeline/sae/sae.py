"""Defines the finished SAE: four tensors and an activation, which encode and decode rows."""

from dataclasses import dataclass, replace
from typing import Self

import torch

from pipeline.runtime.linalg import vector_norm
from pipeline.sae.activation import Activation
from pipeline.sae.activations import RELU


@dataclass(frozen=True, kw_only=True)
class SAE:
    """A sparse autoencoder that reads unscaled activations and has decoder rows of norm 1."""

    W_enc_DF: torch.Tensor
    b_enc_F: torch.Tensor
    W_dec_FD: torch.Tensor
    b_dec_D: torch.Tensor
    activation: Activation = RELU

    @property
    def d_in(self) -> int:
        """Width of the activations it reads."""
        return self.W_dec_FD.shape[1]

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_dec_FD.shape[0]

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.W_dec_FD.device

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Latents [..., F] of activations [..., D]."""
        return self.activation((x.to(self.W_enc_DF.dtype) - self.b_dec_D) @ self.W_enc_DF + self.b_enc_F)

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        """Reconstruction [..., D] of latents [..., F]."""
        return f @ self.W_dec_FD + self.b_dec_D

    def to(self, device: torch.device) -> "SAE":
        """The same SAE on a device."""
        weights = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **weights, activation=self.activation.to(device))

    @classmethod
    def folded(
        cls,
        *,
        W_enc_DF: torch.Tensor,
        b_enc_F: torch.Tensor,
        W_dec_FD: torch.Tensor,
        b_dec_D: torch.Tensor,
        scale: float,
        activation: Activation = RELU,
    ) -> Self:
        """An SAE from weights trained on scaled activations: the same function of unscaled ones, with unit decoder rows.

        The weights were trained on activations times `scale`. A latent f with decoder norm ||w|| becomes f ||w|| / `scale`,
        in the unit of the activations, so that latents of different arms can be compared. Rows of norm 0 stay 0.
        """
        norm_F = vector_norm(W_dec_FD, dim=1)
        return cls(
            W_enc_DF=W_enc_DF * norm_F,
            b_enc_F=b_enc_F * norm_F / scale,
            W_dec_FD=W_dec_FD / norm_F.clamp_min(torch.finfo(norm_F.dtype).tiny)[:, None],
            b_dec_D=b_dec_D / scale,
            activation=activation.scaled(norm_F / scale),
        )
