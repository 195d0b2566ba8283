"""Measures what two seeds of an arm have in common: cosines between the decoder directions that each found."""

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import linear_sum_assignment  # pyright: ignore[reportUnknownVariableType]

from pipeline.evaluate.bench import Bench
from pipeline.evaluate.pairs import blocks_of
from pipeline.runtime.linalg import vector_norm

MOST_MATCHED = 4096
"""Latents up to which they are matched one to one: the time of the assignment grows with their third power."""


def compute(on: Bench) -> dict[str, Any]:
    """The content of `stability.json` (docs/evaluation-files.md)."""
    own_ND = _directions(on.sae.W_dec_FD)
    others = [_directions(sibling.W_dec_FD) for sibling in on.siblings]
    pairs = [(own_ND, other_ND) for other_ND in others if len(own_ND) and len(other_ND)]
    if not pairs:
        return {"seeds": 0, "mmcs": None, "mcc": None, "reason": "an SAE of another seed, or it itself, has no directions"}
    nearest = [float(_nearest(own_ND, other_ND).double().mean()) for own_ND, other_ND in pairs]
    matched = [_matched(own_ND, other_ND) for own_ND, other_ND in pairs if max(len(own_ND), len(other_ND)) <= MOST_MATCHED]
    reason = None if matched else f"more than {MOST_MATCHED:,} latents are not matched one to one"
    mcc = sum(matched) / len(matched) if matched else None
    return {"seeds": len(pairs), "mmcs": sum(nearest) / len(nearest), "mcc": mcc, "reason": reason}


def _directions(W_dec_FD: torch.Tensor) -> torch.Tensor:
    """Rows of norm 1, without those that have no direction."""
    return torch.nn.functional.normalize(W_dec_FD[vector_norm(W_dec_FD, dim=1) > 0], dim=1)


def _nearest(own_ND: torch.Tensor, other_MD: torch.Tensor) -> torch.Tensor:
    """The largest cosine of each direction to one of the other seed, [N]."""
    return torch.cat([(own_ND[block] @ other_MD.T).max(dim=1).values for block in blocks_of(len(own_ND))])


def _matched(own_ND: torch.Tensor, other_MD: torch.Tensor) -> float:
    """Mean cosine when no direction may stand for two of the other seed, and the sum is the largest there is."""
    cosine_NM = cast("npt.NDArray[np.float32]", (own_ND @ other_MD.T).cpu().numpy())
    rows, columns = cast("tuple[npt.NDArray[np.int64], ...]", linear_sum_assignment(cosine_NM, maximize=True))  # untyped
    return float(cosine_NM[rows, columns].mean(dtype=np.float64))
