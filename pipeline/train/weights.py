"""Holds the tensors of an SAE in training, and the buffers that a step computes in."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Self

import torch

from pipeline.runtime.linalg import vector_norm
from pipeline.section import Dtype


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of one SAE, or tensors of the same shapes: gradients, Adam moments."""

    W_enc_DF: torch.Tensor
    b_enc_F: torch.Tensor
    W_dec_FD: torch.Tensor
    b_dec_D: torch.Tensor
    threshold_F: torch.Tensor | None = None
    """Of an activation that learns thresholds, never below 0."""

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Each tensor with its name."""
        there = ((field.name, getattr(self, field.name)) for field in fields(self))
        return ((name, tensor) for name, tensor in there if tensor is not None)

    def tensors(self) -> list[torch.Tensor]:
        """The tensors, in the order of the fields."""
        return [tensor for _, tensor in self.named()]

    def zeros(self) -> Self:
        """Zeros of the same shapes."""
        return type(self)(**{name: torch.zeros_like(tensor) for name, tensor in self.named()})

    def to(self, device: torch.device | str) -> Self:
        """The tensors on a device; those that are there already are not copied."""
        return type(self)(**{name: tensor.to(device) for name, tensor in self.named()})


class Scratch(threading.local):
    """Buffers of one thread, overwritten by every step that the thread takes for any SAE. Copy what must outlive the step.

    Fresh memory of this size costs a page fault per 4 KiB; buffers for each SAE would cost gigabytes in a large cohort.
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

    def clear(self) -> None:
        """Give the memory back."""
        self._buffers.clear()


scratch = Scratch()


def decoder_norms(W_dec_FD: torch.Tensor) -> torch.Tensor:
    """||w_i|| [F], clamped above 0 so that one can divide by it."""
    return vector_norm(W_dec_FD, dim=1).clamp_min_(1e-12)


def operand(name: str, tensor: torch.Tensor, precision: Dtype) -> torch.Tensor:
    """The tensor as an operand of matrix products: itself, or rounded to bfloat16 in the buffer of that name."""
    if precision == "float32":
        return tensor
    return scratch(name, tensor, *tensor.shape, dtype=torch.bfloat16).copy_(tensor)


def product(name: str, left: torch.Tensor, right: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """left @ right in the dtype of `like`, in the buffer of that name."""
    shape = (left.shape[0], right.shape[1])
    result = scratch(name, like, *shape)
    if left.dtype == result.dtype:
        return torch.mm(left, right, out=result)
    return result.copy_(torch.mm(left, right, out=scratch(name, left, *shape)))
