"""On which device of this machine tensors are computed."""

import torch


def best_device() -> torch.device:
    """A GPU where there is one: CUDA, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def training_device() -> torch.device:
    """A GPU of CUDA or the CPU; the fused steps were never tried on Apple's MPS."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
