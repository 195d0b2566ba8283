"""Goes through all pairs of an SAE's latents once, for every evaluation that needs them."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

from pipeline.evaluate.bench import Bench, Missing
from pipeline.evaluate.heldout import Latents
from pipeline.evaluate.pairs import CofiringPairs, CrossTerms, PairBlock, SimilarPairs, pair_blocks
from pipeline.evaluate.reconstruction import Reconstruction, measure_reconstruction
from pipeline.runtime.memory import free_memory
from pipeline.sae.sae import SAE

KEPT_PAIRS = 0.1
"""Share of the device's free memory for the pairs of a baseline's latents, which are the same for all SAEs beside it."""


@dataclass(frozen=True, kw_only=True)
class Beside:
    """Sums of an SAE and of the arm `baseline` with the same seed, latents paired by their index."""

    fixed: CrossTerms
    """Of the SAE, on the baseline's similar pairs."""
    both: CrossTerms
    """Of the SAE, on the pairs that are similar in either of the two."""
    baseline: CrossTerms
    """Of the baseline, on the same."""
    reconstructed: float
    """The baseline's sum over rows of ||x^ - b_dec||^2."""


@dataclass(frozen=True, kw_only=True)
class PairStatistics:
    """The sums of one pass over the pairs."""

    cofiring: CofiringPairs
    own: CrossTerms
    """On the SAE's own similar pairs."""
    beside: Beside | None
    """None without a baseline."""


def measure_pairs(on: Bench) -> PairStatistics:
    """Go through the pairs of an SAE's latents on held-out rows."""
    seen, config = on.once(measure_reconstruction), on.config
    similar = SimilarPairs.of(on.sae.W_dec_FD, config.capture_topk)
    own, cofiring = CrossTerms(on.sae, similar), CofiringPairs(seen.fired_F, seen.rows, config)
    beside = None if isinstance(on.baseline, Missing) else _beside(on, similar, on.baseline)
    for block in pair_blocks(on.latents.sparse, on.sae.d_sae, on.sae.device):
        for sums in (own, cofiring, *((beside.fixed, beside.both) if beside else ())):
            sums.update(block)
    return PairStatistics(cofiring=cofiring, own=own, beside=beside)


@dataclass(frozen=True, kw_only=True)
class _OfBaseline:
    """What is the same for every SAE that is measured beside a baseline."""

    similar: SimilarPairs
    reconstructed: float
    blocks: Callable[[], Iterable[PairBlock]]
    """The pairs of its latents, kept if there is room for them, or else counted again."""


def _of_baseline(on: Bench, baseline: SAE) -> _OfBaseline:
    latents, seen = Latents(baseline, on.layer.rows), Reconstruction(baseline)
    for x_BD, of_chunk in latents.with_rows():
        seen.update(x_BD, of_chunk)
    counted = partial(pair_blocks, latents.sparse, baseline.d_sae, baseline.device)
    if 2 * 4 * baseline.d_sae**2 <= KEPT_PAIRS * free_memory(baseline.device):
        kept = list(counted())
        counted = partial(iter, kept)
    similar = SimilarPairs.of(baseline.W_dec_FD, on.config.capture_topk)
    return _OfBaseline(similar=similar, reconstructed=float(seen.reconstructed), blocks=counted)


def _beside(on: Bench, similar: SimilarPairs, baseline: SAE) -> Beside:
    """The baseline's sums, and those of the SAE before its first block."""
    assert on.planned.baseline is not None
    theirs = on.layer.kept_for(on.planned.baseline, partial(_of_baseline, on, baseline))
    sums = CrossTerms(baseline, similar | theirs.similar)
    for block in theirs.blocks():
        sums.update(block)
    return Beside(
        fixed=CrossTerms(on.sae, theirs.similar),
        both=CrossTerms(on.sae, similar | theirs.similar),
        baseline=sums,
        reconstructed=theirs.reconstructed,
    )
