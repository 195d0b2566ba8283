"""Chooses the device that tensors are computed on."""

import torch


def best_device() -> torch.device:
    """The best device of this machine: CUDA, else Apple's MPS, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def training_device() -> torch.device:
    """CUDA, else the CPU. Training was never tried on Apple's MPS."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
