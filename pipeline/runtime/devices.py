"""Chooses the device that tensors are computed on, and how much is computed at once there."""

import os
import re

import torch

from pipeline.errors import BadInputError

CPU = torch.device("cpu")
VARIABLE = "DASAE_DEVICE"
"""Environment variable that names a device, whatever the experiment says."""
NAMES = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
PANEL_BYTES = 2**30
"""Memory of a GPU for one float32 matrix of some latents by all."""


def best_device(asked: str = "auto") -> torch.device:
    """The device that DASAE_DEVICE names, else the one asked for. `auto`: CUDA, else Apple's MPS, else the CPU.

    Raises BadInputError for a device that this machine does not have.
    """
    name, by = (os.environ[VARIABLE], VARIABLE) if VARIABLE in os.environ else (asked, "run.device")
    if not NAMES.fullmatch(name):
        raise BadInputError(f"{by}: {name!r} is no device; name auto, cpu, mps, cuda or cuda:0")
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if cards else "mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= cards:
        raise BadInputError(f"{by}: there is no {name}; torch {torch.__version__} finds {cards} CUDA devices here")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise BadInputError(f"{by}: there is no mps; torch {torch.__version__} does not find it here")
    return device


def sae_device(asked: str = "auto") -> torch.device:
    """The device on which SAEs are trained and evaluated: as `best_device`, but `auto` is never MPS.

    MPS has no float64, in which evaluation adds up, and training was never tried there.
    """
    device = best_device(asked)
    chosen = os.environ.get(VARIABLE, asked) != "auto"
    return device if chosen or device.type != "mps" else torch.device("cpu")


def cards_for(processes: int, asked: str = "auto") -> list[str]:
    """What CUDA_VISIBLE_DEVICES shows each of so many processes: a card of its own.

    Empty where they compute on the CPU, and for one process that is told which card to take. Raises BadInputError where
    there are fewer cards than processes, or where several are told to take one.
    """
    device = sae_device(asked)
    _, _, number = str(device).partition(":")
    if device.type != "cuda" or (number and processes == 1):
        return []
    cards = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    cards = cards if cards != [""] else [str(card) for card in range(torch.cuda.device_count())]
    if number or processes > len(cards):
        raise BadInputError(
            f"run.workers {processes}: processes that the flow starts take a GPU each, and {device} offers {len(cards)}; "
            "lower run.workers, or set DASAE_DEVICE=cpu"
        )
    return cards[:processes]


def block_rows(latents: int) -> int:
    """How many rows of a float32 matrix [F, F] a GPU computes at once: all of 16,384."""
    return max(1, PANEL_BYTES // (4 * max(1, latents)))
