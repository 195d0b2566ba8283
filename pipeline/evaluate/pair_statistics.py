"""Goes through all pairs of an SAE's latents once, for every evaluation that needs them."""

from dataclasses import dataclass

from pipeline.evaluate.bench import Bench, Missing
from pipeline.evaluate.pairs import CofiringPairs, CrossTerms, SimilarPairs, pair_blocks
from pipeline.evaluate.reconstruction import measure_reconstruction


@dataclass(frozen=True, kw_only=True)
class PairStatistics:
    """The sums of one pass over the pairs."""

    cofiring: CofiringPairs
    own: CrossTerms
    """On the SAE's own similar pairs."""
    fixed: CrossTerms | None
    """On the similar pairs of the arm `baseline`; None without it."""


def measure_pairs(on: Bench) -> PairStatistics:
    """Go through the pairs of an SAE's latents on held-out rows."""
    seen, config = on.once(measure_reconstruction), on.config
    own = CrossTerms(on.sae, SimilarPairs(on.sae.W_dec_FD, config.capture_topk))
    fixed = None
    if not isinstance(on.baseline, Missing):
        fixed = CrossTerms(on.sae, SimilarPairs(on.baseline.W_dec_FD, config.capture_topk))
    cofiring = CofiringPairs(seen.fired_F, seen.rows, config)
    for block in pair_blocks(on.latents.sparse, on.sae.d_sae, on.sae.device):
        for sums in (own, fixed, cofiring) if fixed else (own, cofiring):
            sums.update(block)
    return PairStatistics(cofiring=cofiring, own=own, fixed=fixed)
