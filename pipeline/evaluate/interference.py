"""Measures the share of a reconstruction that is cross terms of latents with similar directions (docs/method.md)."""

from typing import Any

import torch

from pipeline.evaluate.bench import Bench, Missing
from pipeline.evaluate.pair_statistics import measure_pairs
from pipeline.evaluate.pairs import CrossTerms
from pipeline.evaluate.reconstruction import measure_reconstruction


def compute(on: Bench) -> dict[str, Any]:
    """The content of `interference.json` (docs/evaluation-files.md)."""
    pairs, reconstructed = on.once(measure_pairs), float(on.once(measure_reconstruction).reconstructed)
    fixed, reason = None, None
    if isinstance(on.baseline, Missing):
        reason = on.baseline.reason
    elif pairs.fixed:
        fixed = relative(pairs.fixed, reconstructed)
        fixed["same_direction"] = same_direction(on.sae.W_dec_FD, on.baseline.W_dec_FD)
    if not reconstructed:
        reason = "no latent fires on any held-out row"
    return {"own": relative(pairs.own, reconstructed), "fixed": fixed, "reason": reason}


def relative(terms: CrossTerms, reconstructed: float) -> dict[str, Any]:
    """Sums over pairs relative to `reconstructed`, the sum over rows of ||x^ - b_dec||^2.

    interference: the pairs' terms 2 C_ij a_i a_j of that sum, as a share of it. co_activation: the same without the cosines
    C_ij. None where nothing is reconstructed.
    """
    return {
        "pairs": terms.count,
        "interference": 2 * float(terms.cross) / reconstructed if reconstructed else None,
        "co_activation": 2 * float(terms.strength) / reconstructed if reconstructed else None,
    }


def same_direction(W_dec_FD: torch.Tensor, other_FD: torch.Tensor) -> float:
    """Mean cosine of the latents of two SAEs that have the same index: how far an index still means the same latent."""
    return float((W_dec_FD * other_FD).sum(dim=1).mean())
