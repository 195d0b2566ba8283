"""A few latents of an SAE and the texts they fire on most: to look at, not to measure.

Shapes: R held-out rows, S sequences, L tokens, B rows, F d_sae, m latents shown.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pipeline.sae.sae import SAE
from pipeline.store.batches import rows_in_order
from pipeline.store.reader import ActivationStore

CAPTURED = 3
"""Latents shown for having the largest share of captured pairs, and as many for the smallest."""
SHOWN = 10
CONTEXTS = 8
TOKENS_AROUND = 12
"""Tokens of text on either side of the one that fires."""


@dataclass(frozen=True, kw_only=True)
class Behaviour:
    """What is known of every latent when some are to be chosen."""

    density_F: torch.Tensor
    """Share of held-out rows on which each fires."""
    pairs_F: torch.Tensor
    """In how many of the pairs that fire together most each one is."""
    captured_F: torch.Tensor
    """How many of those the top-K mask holds."""


def choose(seen: Behaviour) -> dict[int, str]:
    """Latent to why it is shown: SHOWN of them, or as many as fire at all.

    CAPTURED with the largest share of captured pairs and CAPTURED with the smallest, more pairs first, then the lower index;
    the others evenly spread over the ranks of density.
    """
    paired = seen.pairs_F.nonzero().squeeze(1).tolist()
    share = {latent: int(seen.captured_F[latent]) / int(seen.pairs_F[latent]) for latent in paired}
    most = sorted(paired, key=lambda latent: (-share[latent], -int(seen.pairs_F[latent]), latent))[:CAPTURED]
    least = sorted(paired, key=lambda latent: (share[latent], -int(seen.pairs_F[latent]), latent))
    chosen = dict.fromkeys(most, "most captured")
    chosen |= dict.fromkeys([latent for latent in least if latent not in chosen][:CAPTURED], "least captured")
    by_density = seen.density_F.sort(descending=True, stable=True).indices.tolist()
    rest = [latent for latent in by_density if seen.density_F[latent] > 0 and latent not in chosen]
    wanted = min(SHOWN - len(chosen), len(rest))
    # The middles of `wanted` equal parts of the ranks.
    return chosen | {rest[(2 * part + 1) * len(rest) // (2 * wanted)]: "density" for part in range(wanted)}


class Examples:
    """The held-out rows of a layer, where in the text they stand, and a tokenizer that makes text of their surroundings."""

    def __init__(self, store: ActivationStore, layer: int, shards: Sequence[int], tokenizer: Any):
        self.store, self.layer, self.shards, self.tokenizer = store, layer, shards, tokenizer
        self.tokens_SL = store.whole("tokens")
        self.sequence_R, self.position_R = (
            np.concatenate([store.read_field(name, *store.row_range(shard)) for shard in shards])
            for name in ("sequence", "position")
        )

    def of(self, sae: SAE, seen: Behaviour) -> list[dict[str, Any]]:
        """What docs/evaluation-files.md lists for `latents` in `examples.json`."""
        chosen = choose(seen)
        rows = rows_in_order(self.store, self.layer, self.shards)
        f_Rm = torch.cat([sae.encode(x_BD)[:, list(chosen)] for x_BD in rows])
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

    def _contexts(self, f_R: torch.Tensor) -> list[dict[str, Any]]:
        """The rows on which a latent fires most strongly, at most one of each sequence."""
        strongest: dict[int, int] = {}
        for row in f_R.sort(descending=True, stable=True).indices.tolist():
            if f_R[row] == 0 or len(strongest) == CONTEXTS:
                break
            strongest.setdefault(int(self.sequence_R[row]), row)
        return [{"strength": float(f_R[row]), **self._text(row)} for row in strongest.values()]

    def _text(self, row: int) -> dict[str, Any]:
        sequence, position = int(self.sequence_R[row]), int(self.position_R[row])
        tokens = self.tokens_SL[sequence].tolist()
        start = max(0, position - TOKENS_AROUND)
        return {
            "sequence": sequence,
            "position": position,
            "before": self._decoded(tokens[start:position]),
            "token": self._decoded(tokens[position : position + 1]),
            "after": self._decoded(tokens[position + 1 : position + 1 + TOKENS_AROUND]),
        }

    def _decoded(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
