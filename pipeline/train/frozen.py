"""Controls that train only a part: what an SAE reaches when its decoder or its encoder stays, or nearly stays, random.

After "Sanity Checks for Sparse Autoencoders" (arXiv 2602.14111).
"""

import math

import torch

from pipeline.runtime.linalg import vecdot, vector_norm
from pipeline.train.weights import Weights

NEAR = 0.8
"""Smallest cosine of a decoder row to its start under `soft-decoder`."""


def freeze(frozen: str | None, gradient: Weights) -> None:
    """Zero the gradient of the matrix that does not train. Biases always do: without them no sparsity could be reached."""
    if frozen in ("decoder", "both"):
        gradient.W_dec_FD.zero_()
    if frozen in ("encoder", "both"):
        gradient.W_enc_DF.zero_()


@torch.no_grad()
def keep_near_(W_dec_FD: torch.Tensor, start_FD: torch.Tensor) -> None:
    """Turn rows whose cosine to their start, of norm 1, is below NEAR back to it, in the plane of the two. Norms stay."""
    norm_F = vector_norm(W_dec_FD, dim=1).clamp_min(1e-12)
    along_F = vecdot(W_dec_FD, start_FD)
    across_FD = W_dec_FD - along_F[:, None] * start_FD
    across_FD /= vector_norm(across_FD, dim=1, keepdim=True).clamp_min(1e-12)
    turned_FD = norm_F[:, None] * (NEAR * start_FD + math.sqrt(1 - NEAR**2) * across_FD)
    W_dec_FD.copy_(torch.where((along_F < NEAR * norm_F)[:, None], turned_FD, W_dec_FD))
