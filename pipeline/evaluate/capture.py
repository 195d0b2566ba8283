"""Measures the bidirectional pair capture rate: of the pairs that fire together most, the share that the top-K mask selects.

Defined in docs/method.md, "Pair capture". The rate says how well the mask aims at co-firing pairs. It is no score: it must
fall when the penalty works.
"""

from collections.abc import Iterable
from typing import Any

import torch

from pipeline.evaluate.bench import Bench
from pipeline.evaluate.heldout import Latents
from pipeline.evaluate.pair_statistics import measure_pairs
from pipeline.evaluate.pairs import MOST_PAIRS, CofiringPairs, TopK, TopPairs, firings, pair_blocks
from pipeline.evaluate.reconstruction import measure_reconstruction
from pipeline.sae.sae import SAE
from pipeline.study.sections import EvaluateConfig

NULL_SEED = 1_000_003
"""Seed of the first random SAE. Training has small seeds; one of those would give a trained SAE's first directions."""
TOPK_CURVE = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
"""K of the curve over masks."""
PAIRS_CURVE = (0.25, 0.5, 1.0, 2.0, MOST_PAIRS)
"""Sizes of Q, in n, of the curve over pairs."""
PERMUTATIONS = 100
RATES = ("row", "column", "union", "mutual", "chance", "lift", "kappa")


class Capture:
    """Capture rates of one SAE, from its decoder directions [F, D] and the pairs that fire together most.

    Q is the n pairs of the n live latents that fire together most. row, column: share of Q, as ordered pairs, in the row's
    or column's top-K, which are equal because cosine is symmetric. union, mutual: share of Q in either or both; row =
    (union + mutual) / 2. chance: share of all live pairs in the union. An undefined value is None, and `reason` says why.
    """

    def __init__(self, W_dec_FD: torch.Tensor, cofiring: CofiringPairs, config: EvaluateConfig):
        self.cofiring, self.config, self.n = cofiring, config, len(cofiring.live_N)
        self.topk = TopK(W_dec_FD[cofiring.live_N], (*TOPK_CURVE, config.capture_topk))

    def compute(self) -> dict[str, Any]:
        """The content of `capture.json` (docs/evaluation-files.md), without `null`."""
        config, by_strength = self.config, self.cofiring.by_strength
        result = {"live": self.n, **self._rates(by_strength), "strength_weighted": None}
        permuted = None
        if result["union"] is not None:
            strength_P = by_strength.strength_P[: self.n].double()
            captured = strength_P[self.topk.union(self._pairs(by_strength), config.capture_topk)]
            result["strength_weighted"] = float(captured.sum() / strength_P.sum())
            permuted = self._permuted()
        return result | {
            "phi": self._rates(self.cofiring.by_phi),
            "by_topk": [{"topk": topk} | self._rates(by_strength, topk) for topk in TOPK_CURVE],
            "by_pairs": [{"q": q} | self._rates(by_strength, config.capture_topk, q) for q in PAIRS_CURVE],
            "permuted": permuted,
        }

    def by_latent(self, d_sae: int) -> tuple[torch.Tensor, torch.Tensor]:
        """int64 [F] twice: how many pairs of Q each latent is in, and how many of those the union holds."""
        pair_P2 = self.cofiring.by_strength.pair_P2[: self.n]
        captured_P = self.topk.union(self._pairs(self.cofiring.by_strength), self.config.capture_topk)
        return pair_P2.flatten().bincount(minlength=d_sae), pair_P2[captured_P].flatten().bincount(minlength=d_sae)

    @property
    def strongest(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The pairs [P, 2] that fire together most, and how strongly, strongest first. The first n are Q."""
        return self.cofiring.by_strength.pair_P2, self.cofiring.by_strength.strength_P

    def _pairs(self, pairs: TopPairs, q: float = 1.0) -> torch.Tensor:
        """The first q n pairs, as places among the live latents."""
        return torch.searchsorted(self.cofiring.live_N, pairs.pair_P2[: max(1, round(q * self.n))])

    def _rates(self, pairs: TopPairs, topk: float | None = None, q: float = 1.0) -> dict[str, Any]:
        """RATES at one K and one size of Q."""
        topk = self.config.capture_topk if topk is None else topk
        undefined = dict.fromkeys(RATES) | {"pairs": 0}
        if self.n < 3:
            return undefined | {"reason": f"{self.n} latents fire on {self.config.live_firings} rows or more"}
        chance = self.topk.chance(topk)
        if not len(pairs):
            reason = f"no two latents fire together on {self.config.joint_firings} rows or more"
            return undefined | {"chance": chance, "reason": reason}
        row_P, column_P = self.topk.holds(self._pairs(pairs, q), topk)
        # Every pair counts as (i, j) and as (j, i); the row of one is the column of the other.
        ordered = float(torch.cat([row_P, column_P]).double().mean())
        union = float((row_P | column_P).double().mean())
        return {
            "row": ordered,
            "column": ordered,
            "union": union,
            "mutual": float((row_P & column_P).double().mean()),
            "chance": chance,
            "lift": union / chance,
            "kappa": (union - chance) / (1 - chance) if chance < 1 else None,
            "pairs": len(row_P),
            "reason": None if chance < 1 else "no kappa: the mask holds every pair",
        }

    def _permuted(self) -> dict[str, Any]:
        """Mean and standard deviation of the union's rate when the live latents are relabelled at random."""
        generator = torch.Generator().manual_seed(NULL_SEED)
        pair_P2 = self._pairs(self.cofiring.by_strength)
        drawn_N = (torch.randperm(self.n, generator=generator).to(pair_P2.device) for _ in range(PERMUTATIONS))
        relabelled = (label_N[pair_P2] for label_N in drawn_N)
        drawn = [self.topk.union(pairs, self.config.capture_topk).double().mean() for pairs in relabelled]
        return {"draws": PERMUTATIONS, "mean": float(torch.stack(drawn).mean()), "std": float(torch.stack(drawn).std())}


def random_tied(sae: SAE, chunks: Iterable[torch.Tensor], rows: int, l0: float, draw: int) -> SAE:
    """An SAE of random unit directions, encoder tied, whose biases give it the L0 `l0` on all rows, or TopK its own.

    `chunks` are the rows [B, D]. All latents fire from one projection on. It keeps b_dec and the activation, so that only
    the directions are random, and another `draw` has others. Similar encoder directions fire together by geometry alone:
    what this SAE's mask captures is not learned.
    """
    d_sae, d_in = sae.W_dec_FD.shape
    generator = torch.Generator().manual_seed(NULL_SEED + draw)
    W_dec_FD = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1).to(sae.device)
    firing = min(max(1, round(l0 * rows)), rows * d_sae - 1)
    threshold = largest_but(firing, ((x_BD - sae.b_dec_D) @ W_dec_FD.T for x_BD in chunks))
    return SAE(
        W_enc_DF=W_dec_FD.T,
        b_enc_F=sae.activation.bias(threshold, sae.b_enc_F),
        W_dec_FD=W_dec_FD,
        b_dec_D=sae.b_dec_D,
        activation=sae.activation.untrained(),
    )


def largest_but(number: int, chunks: Iterable[torch.Tensor]) -> float:
    """The largest value in all chunks after the first `number`; the smallest, where there are not so many."""
    kept: list[torch.Tensor] = []
    bound = -torch.inf
    for chunk in chunks:
        values = chunk.flatten()
        kept.append(values[values >= bound])
        if sum(map(len, kept)) > 4 * (number + 1):  # values below the bound cannot be it; selecting is cheaper than sorting
            values = torch.cat(kept)
            bound = float(values.kthvalue(len(values) - number).values)
            kept = [values[values >= bound]]
    values = torch.cat(kept)
    return float(values.kthvalue(max(1, len(values) - number)).values)


def measure_capture(on: Bench) -> Capture:
    """The capture rates of the SAE itself."""
    return Capture(on.sae.W_dec_FD, on.once(measure_pairs).cofiring, on.config)


def measure_random_capture(on: Bench, draw: int) -> Capture:
    """The capture rates of a random SAE with the same L0."""
    seen = on.once(measure_reconstruction)
    null = random_tied(on.sae, on.layer.rows, seen.rows, seen.l0, draw)
    latents = Latents(null, on.layer.rows)
    cofiring = CofiringPairs(firings(latents.sparse()), seen.rows, on.config)
    for block in pair_blocks(latents.sparse, null.d_sae, null.device):
        cofiring.update(block)
    return Capture(null.W_dec_FD, cofiring, on.config)


def compute(on: Bench) -> dict[str, Any]:
    """The content of `capture.json` (docs/evaluation-files.md)."""
    null = [measure_random_capture(on, draw).compute() for draw in range(on.config.null_draws)]
    return on.once(measure_capture).compute() | {"null": null}
