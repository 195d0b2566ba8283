"""Measures the geometry of an SAE from its weights alone, beside that of random directions."""

from typing import Any

import torch

from pipeline.evaluate.bench import Bench
from pipeline.evaluate.pairs import blocks_of
from pipeline.evaluate.reconstruction import COSINE_EDGES, histogram
from pipeline.runtime.linalg import vecdot, vector_norm

NEAR = 0.9
"""Cosine from which on two latents count as nearly one."""
NULL_SEED = 0


def nearest_cosines(direction_ND: torch.Tensor) -> torch.Tensor:
    """For each of some unit directions the largest cosine to another, [N]."""
    found: list[torch.Tensor] = []
    for block in blocks_of(len(direction_ND)):
        cosine_bN = direction_ND[block] @ direction_ND.T
        cosine_bN.diagonal(block.start).fill_(-torch.inf)
        found.append(cosine_bN.max(dim=1).values)
    return torch.cat(found) if found else direction_ND.new_zeros(0)


def compute(on: Bench) -> dict[str, Any]:
    """The content of `geometry.json` (docs/evaluation-files.md)."""
    W_enc_FD, W_dec_FD = on.sae.W_enc_DF.T, on.sae.W_dec_FD
    # A row of norm 0 has no direction. It would count as a cosine of 0 to everything.
    directed_F = (vector_norm(W_dec_FD, dim=1) > 0) & (vector_norm(W_enc_FD, dim=1) > 0)
    encoder_ND, decoder_ND = (torch.nn.functional.normalize(W_FD[directed_F], dim=1) for W_FD in (W_enc_FD, W_dec_FD))
    random_ND = torch.randn(decoder_ND.shape, generator=torch.Generator().manual_seed(NULL_SEED)).to(decoder_ND)
    return {
        "directions": len(decoder_ND),
        "nearest": _described(nearest_cosines(decoder_ND)),
        "nearest_random": _described(nearest_cosines(torch.nn.functional.normalize(random_ND, dim=1))),
        "encoder_decoder": _described(vecdot(encoder_ND, decoder_ND)),
    }


def _described(cosine_N: torch.Tensor) -> dict[str, Any]:
    """Of at least two latents: mean, median, share from NEAR on, histogram between COSINE_EDGES. None of fewer."""
    if len(cosine_N) < 2:
        return {"mean": None, "median": None, "near": None, "edges": COSINE_EDGES, "counts": None}
    return {
        "mean": float(cosine_N.double().mean()),
        "median": float(cosine_N.median()),
        "near": float((cosine_N >= NEAR).double().mean()),
        "edges": COSINE_EDGES,
        "counts": histogram(cosine_N, COSINE_EDGES).tolist(),
    }
