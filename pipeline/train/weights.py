"""The four tensors of an SAE in training, and buffers for what a step computes.

Shapes: D d_in, F d_sae.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Self

import torch

from pipeline.section import Dtype


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of one SAE, or what there is one of per weight: gradients, Adam moments."""

    W_enc_DF: torch.Tensor
    b_enc_F: torch.Tensor
    W_dec_FD: torch.Tensor
    b_dec_D: torch.Tensor

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor with its name."""
        return ((field.name, getattr(self, field.name)) for field in fields(self))

    def tensors(self) -> list[torch.Tensor]:
        """The tensors, in the order of the fields."""
        return [tensor for _, tensor in self.named()]

    def zeros(self) -> Self:
        """As many zeros."""
        return type(self)(**{name: torch.zeros_like(tensor) for name, tensor in self.named()})

    def to(self, device: torch.device | str) -> Self:
        """The same on a device; on their own device the same tensors, not copies."""
        return type(self)(**{name: tensor.to(device) for name, tensor in self.named()})


class Scratch(threading.local):
    """Buffers that every step of a thread overwrites, whichever SAE takes it.

    Fresh memory of this size costs a page fault per 4 KiB; buffers of each SAE's own would cost gigabytes in a large cohort.
    What is read after the step must be copied.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def __call__(self, name: str, like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
        """An uninitialised tensor [*shape] on the device of `like`, and of its dtype unless one is given."""
        dtype = dtype or like.dtype
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.shape != shape or buffer.device != like.device:
            buffer = torch.empty(shape, dtype=dtype, device=like.device)
            self._buffers[name, dtype] = buffer
        return buffer


scratch = Scratch()


def factor(name: str, tensor: torch.Tensor, precision: Dtype) -> torch.Tensor:
    """The tensor as a factor of matrix products: itself, or rounded to bfloat16 in the buffer of that name."""
    if precision == "float32":
        return tensor
    return scratch(name, tensor, *tensor.shape, dtype=torch.bfloat16).copy_(tensor)
