"""The finished SAE: four tensors, encode, decode, and SAELens' `standard` format on disk.

Shapes: B rows, D d_in, F d_sae.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors.torch import load_file, save_file

from pipeline.sae.activations import RELU, Activation

SAELENS_FORMAT = "6.0.0"
"""The SAELens release whose configuration format is written; without it SAELens assumes an older one, without metadata."""
CONFIG = "cfg.json"
WEIGHTS = "sae_weights.safetensors"


@dataclass(frozen=True, kw_only=True)
class SAE:
    """A ReLU sparse autoencoder that reads raw activations and has decoder rows of norm 1."""

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

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Latents [..., F] of activations [..., D]."""
        return self.activation((x.to(self.W_enc_DF.dtype) - self.b_dec_D) @ self.W_enc_DF + self.b_enc_F)

    def decode(self, f: torch.Tensor) -> torch.Tensor:
        """Reconstruction [..., D] of latents [..., F]."""
        return f @ self.W_dec_FD + self.b_dec_D

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
        """The same function of unscaled activations, with unit decoder rows.

        The arguments are weights trained on activations times `scale`. A latent becomes its strength f ||w|| in the units of
        the activations, so that latents of different arms can be compared. Rows of norm 0 stay 0.
        """
        norm_F = W_dec_FD.norm(dim=1)
        return cls(
            W_enc_DF=W_enc_DF * norm_F,
            b_enc_F=b_enc_F * norm_F / scale,
            W_dec_FD=W_dec_FD / norm_F.clamp_min(torch.finfo(norm_F.dtype).tiny)[:, None],
            b_dec_D=b_dec_D / scale,
            activation=activation,
        )

    def save(self, folder: Path, metadata: Mapping[str, Any]) -> None:
        """Write `cfg.json` and `sae_weights.safetensors` so that `sae_lens.SAE.load_from_disk` reads them."""
        config = {
            "architecture": "standard",
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "dtype": "float32",
            "device": "cpu",
            "apply_b_dec_to_input": True,
            "normalize_activations": "none",
            "reshape_activations": "none",
            "metadata": {"sae_lens_version": SAELENS_FORMAT, **metadata},
        }
        (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
        tensors = {"W_enc": self.W_enc_DF, "b_enc": self.b_enc_F, "W_dec": self.W_dec_FD, "b_dec": self.b_dec_D}
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)

    @classmethod
    def load(cls, weights: Path) -> Self:
        """Read the weights that `save` wrote."""
        tensors = load_file(weights)
        return cls(
            W_enc_DF=tensors["W_enc"],
            b_enc_F=tensors["b_enc"],
            W_dec_FD=tensors["W_dec"],
            b_dec_D=tensors["b_dec"],
        )
