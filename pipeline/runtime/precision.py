"""Says in which precision matrix products are computed, and whether an experiment's choice is the faster one here."""

import time
from collections.abc import Generator
from contextlib import contextmanager

import torch

WORTH_TELLING = 1.1
"""Ratio of the times of a product from which on the slower precision is told."""
SMALLEST = 10**8
"""Multiplications of a product below which its time says nothing."""
ROUNDS = 3


@contextmanager
def tensor_cores(device: torch.device) -> Generator[None]:
    """Inside the block, float32 products on CUDA round their factors to TF32 (10 bits of mantissa): several times faster.

    For training only. Evaluation and extraction keep exact float32, and so does every product on a CPU.
    """
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def slower_choice(chosen: str, rows: int, d_in: int, latents: int, device: torch.device) -> str | None:
    """A sentence if an SAE's product x W takes longer in the chosen precision than in the other; None if it does not.

    The choice stays the experiment's: it changes the weights, and is part of their identity.
    """
    if rows * latents * d_in < SMALLEST:
        return None
    other = "bfloat16" if chosen == "float32" else "float32"
    chosen_ms, other_ms = _milliseconds((chosen, other), rows, d_in, latents, device)
    if chosen_ms < WORTH_TELLING * other_ms:
        return None
    return (
        f'train.precision "{chosen}" is the slower one here: a matrix product takes {chosen_ms:.3g} ms, and in '
        f"{other} {other_ms:.3g} ms"
    )


def _milliseconds(dtypes: tuple[str, str], rows: int, d_in: int, latents: int, device: torch.device) -> list[float]:
    """The shortest time of x W in each dtype, measured in turn."""
    operands: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name in dtypes:
        dtype: torch.dtype = getattr(torch, name)
        shapes = ((rows, d_in), (d_in, latents))
        left, right = (torch.ones(shape, dtype=dtype, device=device) for shape in shapes)
        operands.append((left, right))
    best = [float("inf")] * len(operands)
    for _ in range(ROUNDS + 1):  # the first is a warm-up, and never the shortest
        for place, (left, right) in enumerate(operands):
            started = time.perf_counter()
            torch.mm(left, right).sum().item()  # waits for a device
            best[place] = min(best[place], 1e3 * (time.perf_counter() - started))
    return best
