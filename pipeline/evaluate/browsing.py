"""Collects many latents and pairs of an SAE with the texts on which they fire most, for the page's browser: to look at."""

from typing import Any, cast

import torch

from pipeline.evaluate.bench import Bench
from pipeline.evaluate.capture import measure_capture
from pipeline.evaluate.examples import HeldoutText, strongest_rows
from pipeline.evaluate.reconstruction import measure_reconstruction
from pipeline.runtime.linalg import vecdot
from pipeline.study.evaluations import Need

PAIRS = 24
"""Of the pairs that fire together most, those that the mask captures, and as many that it misses."""
LATENTS = 120
"""Their members, and others spread evenly over the ranks of density."""
CONTEXTS, AROUND = 4, 8
"""Texts for a latent, and tokens shown on either side of the one on which it fires."""


def compute(on: Bench) -> dict[str, Any]:
    """The content of `browsing.json` (docs/evaluation-files.md)."""
    if Need.model not in on.layer.has:
        return {"latents": [], "pairs": [], "reason": "a synthetic model reads no text"}
    seen, capture = on.once(measure_reconstruction), on.once(measure_capture)
    pairs = _pairs(on)
    in_pairs: list[int] = list(dict.fromkeys(latent for pair in pairs for latent in pair["latents"]))
    density_F = cast("list[float]", (seen.fired_F.cpu().double() / seen.rows).tolist())
    ranked = sorted((latent for latent in range(on.sae.d_sae) if density_F[latent] > 0), key=lambda one: -density_F[one])
    rest = [latent for latent in ranked if latent not in set(in_pairs)]
    wanted = min(max(0, LATENTS - len(in_pairs)), len(rest))
    chosen = in_pairs + [rest[(2 * part + 1) * len(rest) // (2 * wanted)] for part in range(wanted)]
    member_F, captured_F = cast("list[list[int]]", [counts.tolist() for counts in capture.by_latent(on.sae.d_sae)])
    text, rows = on.layer.once(HeldoutText), strongest_rows((f_BF[:, chosen] for f_BF in on.latents), len(chosen))
    latents = [
        {
            "latent": latent,
            "density": density_F[latent],
            "pairs": member_F[latent],
            "captured": captured_F[latent],
            "contexts": text.around(strongest, CONTEXTS, AROUND),
        }
        for latent, strongest in zip(chosen, rows, strict=True)
    ]
    return {"latents": latents, "pairs": pairs, "reason": None}


def _pairs(on: Bench) -> list[dict[str, Any]]:
    """PAIRS that are captured and PAIRS that are not, each strongest first."""
    capture, W_dec_FD = on.once(measure_capture), on.sae.W_dec_FD
    pair_P2, strength_P = (values[: capture.n] for values in capture.strongest)
    captured_P = capture.topk.union(torch.searchsorted(capture.cofiring.live_N, pair_P2), on.config.capture_topk)
    found: list[dict[str, Any]] = []
    for captured in (True, False):
        places = (captured_P == captured).nonzero().squeeze(1)[:PAIRS]
        cosine_p = vecdot(*(W_dec_FD[latent_p] for latent_p in pair_P2[places].T)) if len(places) else places
        pairs = cast("list[list[int]]", pair_P2[places].tolist())
        strengths, cosines = cast("list[list[float]]", [strength_P[places].tolist(), cosine_p.tolist()])
        found += [
            {"latents": pair, "strength": strength, "cosine": cosine, "captured": captured}
            for pair, strength, cosine in zip(pairs, strengths, cosines, strict=True)
        ]
    return found
