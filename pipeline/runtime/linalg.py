"""Wraps functions of torch.linalg to give them static types, which torch leaves out."""

from typing import cast

import torch


def vector_norm(x: torch.Tensor, dim: int | None = None, *, keepdim: bool = False) -> torch.Tensor:
    """Euclidean norm along `dim`, of all numbers together by default."""
    return cast("torch.Tensor", torch.linalg.vector_norm(x, dim=dim, keepdim=keepdim))


def vecdot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Dot products along the last dimension."""
    return cast("torch.Tensor", torch.linalg.vecdot(x, y))
