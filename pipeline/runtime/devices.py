"""Chooses the device that tensors are computed on, and how much is computed at once there."""

import torch

PANEL_BYTES = 2**30
"""Memory of a GPU for one float32 matrix of some latents by all."""


def best_device() -> torch.device:
    """The best device of this machine: CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def training_device() -> torch.device:
    """CUDA, else the CPU. Training was never tried on Apple's MPS."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def block_rows(latents: int) -> int:
    """How many rows of a float32 matrix [F, F] a GPU computes at once: all of 16,384."""
    return max(1, PANEL_BYTES // (4 * max(1, latents)))
