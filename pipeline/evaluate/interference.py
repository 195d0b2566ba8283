"""Measures the share of a reconstruction that is cross terms of latents with similar directions (docs/method.md)."""

from typing import Any

import torch

from pipeline.evaluate.bench import Bench, Missing
from pipeline.evaluate.pair_statistics import measure_pairs
from pipeline.evaluate.pairs import CrossTerms
from pipeline.evaluate.reconstruction import measure_reconstruction


def compute(on: Bench) -> dict[str, Any]:
    """The content of `interference.json` (docs/evaluation-files.md)."""
    pairs, seen = on.once(measure_pairs), on.once(measure_reconstruction)
    reconstructed = float(seen.reconstructed)
    fixed, both, reason = None, None, None
    if isinstance(on.baseline, Missing):
        reason = on.baseline.reason
    elif pairs.beside:
        fixed = relative(pairs.beside.fixed, reconstructed)
        fixed["same_direction"] = same_direction(on.sae.W_dec_FD, on.baseline.W_dec_FD, seen.fired_F > 0)
        both = in_both(
            relative(pairs.beside.both, reconstructed), relative(pairs.beside.baseline, pairs.beside.reconstructed)
        )
    if not reconstructed:
        reason = "no latent fires on any held-out row"
    return {"own": relative(pairs.own, reconstructed), "fixed": fixed, "both": both, "reason": reason}


def in_both(of_sae: dict[str, Any], of_baseline: dict[str, Any]) -> dict[str, Any]:
    """Interference of an SAE and of its baseline on the same pairs, those similar in either, and the first less the second.

    On the pairs of one of the two, the other interferes less by drift alone: its similar latents are elsewhere.
    """
    ours, theirs = of_sae["interference"], of_baseline["interference"]
    change = None if ours is None or theirs is None else ours - theirs
    return {"pairs": of_sae["pairs"], "interference": ours, "baseline": theirs, "change": change}


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


def same_direction(W_dec_FD: torch.Tensor, other_FD: torch.Tensor, alive_F: torch.Tensor) -> float | None:
    """Mean cosine of the latents of two SAEs that have the same index: how far an index still means the same latent.

    Only of latents that fire: a dead one does not move. None where none fires.
    """
    cosine_N = (W_dec_FD * other_FD).sum(dim=1)[alive_F]
    return float(cosine_N.mean()) if len(cosine_N) else None
