"""Picks a few latents of an SAE and the texts on which they fire most: to look at, not to measure."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from pipeline.evaluate.bench import Bench, LayerBench
from pipeline.evaluate.capture import measure_capture
from pipeline.evaluate.reconstruction import measure_reconstruction
from pipeline.study.evaluations import Need

CAPTURED = 3
"""Latents shown with the largest share of captured pairs, and as many with the smallest."""
SHOWN = 10
CONTEXTS = 8
TOKENS_AROUND = 12
"""Tokens shown on either side of the one on which the latent fires."""
CANDIDATES = 32
"""Strongest rows of a column in `strongest_rows`, among which those of other sequences are looked for."""


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """The numbers by which the shown latents are chosen."""

    density_F: torch.Tensor
    """Share of held-out rows on which each latent fires."""
    pairs_F: torch.Tensor
    """Number of pairs in Q, those that fire together most, that each latent is in."""
    captured_F: torch.Tensor
    """Number of those pairs that the top-K mask holds."""


def choose(seen: LatentStatistics) -> dict[int, str]:
    """The latents that are shown, each with the reason: SHOWN, or all that fire if they are fewer.

    CAPTURED with the largest share of captured pairs and CAPTURED with the smallest, ties to more pairs, then to the lower
    index; the others evenly spread over the ranks of density.
    """
    paired = cast("list[int]", seen.pairs_F.nonzero().squeeze(1).tolist())
    share = {latent: int(seen.captured_F[latent]) / int(seen.pairs_F[latent]) for latent in paired}
    most = sorted(paired, key=lambda latent: (-share[latent], -int(seen.pairs_F[latent]), latent))[:CAPTURED]
    least = sorted(paired, key=lambda latent: (share[latent], -int(seen.pairs_F[latent]), latent))
    chosen = dict.fromkeys(most, "most captured")
    chosen |= dict.fromkeys([latent for latent in least if latent not in chosen][:CAPTURED], "least captured")
    by_density = cast("list[int]", seen.density_F.sort(descending=True, stable=True).indices.tolist())
    rest = [latent for latent in by_density if seen.density_F[latent] > 0 and latent not in chosen]
    wanted = min(SHOWN - len(chosen), len(rest))
    # The middles of `wanted` equal parts of the ranks.
    return chosen | {rest[(2 * part + 1) * len(rest) // (2 * wanted)]: "density" for part in range(wanted)}


def strongest_rows(chunks: Iterable[torch.Tensor], columns: int) -> list[list[tuple[int, float]]]:
    """For each column of chunks [B, m] of all held-out rows its CANDIDATES largest values above 0, each after its row."""
    best_Rm, row_Rm, first = torch.empty(0, columns), torch.empty(0, columns, dtype=torch.int64), 0
    for value_Bm in chunks:
        rows_Bm = torch.arange(first, first + len(value_Bm))[:, None].expand(value_Bm.shape)
        best_Rm, row_Rm = torch.cat([best_Rm, value_Bm.cpu()]), torch.cat([row_Rm, rows_Bm])
        order_Rm = best_Rm.sort(dim=0, descending=True, stable=True).indices[:CANDIDATES]
        best_Rm, row_Rm, first = best_Rm.gather(0, order_Rm), row_Rm.gather(0, order_Rm), first + len(value_Bm)
    rows, strengths = cast("list[list[int]]", row_Rm.T.tolist()), cast("list[list[float]]", best_Rm.T.tolist())
    return [
        [(row, strength) for row, strength in zip(*both, strict=True) if strength > 0]
        for both in zip(rows, strengths, strict=True)
    ]


class HeldoutText:
    """The text around every held-out row of a layer."""

    def __init__(self, layer: LayerBench):
        store = layer.store
        self.tokenizer = layer.tokenizer
        self.sequence_R, self.position_R = (
            np.concatenate([store.read_field(name, *store.row_range(shard)) for shard in layer.heldout_shards])
            for name in ("sequence", "position")
        )
        # Only these sequences: those of all tokens may be larger than memory.
        self.first = int(self.sequence_R.min())
        self.tokens_SL = store.array("tokens").read(self.first, int(self.sequence_R.max()) + 1)

    def examples(self, latents: Iterable[torch.Tensor], seen: LatentStatistics) -> list[dict[str, Any]]:
        """The `latents` of `examples.json` (docs/evaluation-files.md), from chunks [B, F] of all held-out rows."""
        chosen = choose(seen)
        f_Rm = torch.cat([f_BF[:, list(chosen)].cpu() for f_BF in latents])
        return [
            {
                "latent": latent,
                "why": why,
                "density": float(seen.density_F[latent]),
                "captured": int(seen.captured_F[latent]),
                "pairs": int(seen.pairs_F[latent]),
                "contexts": self._contexts(f_R),
            }
            for (latent, why), f_R in zip(chosen.items(), f_Rm.T, strict=True)
        ]

    def around(self, strongest: Iterable[tuple[int, float]], contexts: int, tokens: int) -> list[dict[str, Any]]:
        """Texts around rows, given with their strengths, strongest first: of each sequence the first row."""
        found: dict[int, dict[str, Any]] = {}
        for row, strength in strongest:
            if len(found) < contexts:
                found.setdefault(int(self.sequence_R[row]), {"strength": strength, **self._text(row, tokens)})
        return [{name: shown[name] for name in ("strength", "before", "token", "after")} for shown in found.values()]

    def _contexts(self, f_R: torch.Tensor) -> list[dict[str, Any]]:
        """The rows on which a latent fires most strongly, at most one of each sequence."""
        strongest: dict[int, int] = {}
        for row in cast("list[int]", f_R.sort(descending=True, stable=True).indices.tolist()):
            if f_R[row] == 0 or len(strongest) == CONTEXTS:
                break
            strongest.setdefault(int(self.sequence_R[row]), row)
        return [{"strength": float(f_R[row]), **self._text(row)} for row in strongest.values()]

    def _text(self, row: int, around: int = TOKENS_AROUND) -> dict[str, Any]:
        sequence, position = int(self.sequence_R[row]), int(self.position_R[row])
        tokens: list[int] = self.tokens_SL[sequence - self.first].tolist()
        start = max(0, position - around)
        return {
            "sequence": sequence,
            "position": position,
            "before": self._decoded(tokens[start:position]),
            "token": self._decoded(tokens[position : position + 1]),
            "after": self._decoded(tokens[position + 1 : position + 1 + around]),
        }

    def _decoded(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)


def compute(on: Bench) -> dict[str, Any]:
    """The content of `examples.json` (docs/evaluation-files.md)."""
    if Need.model not in on.layer.has:
        return {"latents": [], "reason": "a synthetic model reads no text"}
    seen = on.once(measure_reconstruction)
    pairs_F, captured_F = on.once(measure_capture).by_latent(on.sae.d_sae)
    statistics = LatentStatistics(
        density_F=seen.fired_F.cpu().double() / seen.rows, pairs_F=pairs_F.cpu(), captured_F=captured_F.cpu()
    )
    return {"latents": on.layer.once(HeldoutText).examples(on.latents, statistics), "reason": None}
