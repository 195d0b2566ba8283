"""Measures how well an SAE reconstructs held-out rows, how many latents fire, and the cosines of its decoder directions."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from pipeline.errors import DegenerateSAEError
from pipeline.evaluate.bench import Bench
from pipeline.evaluate.pairs import blocks_of
from pipeline.evaluate.sparse import SparseLatents
from pipeline.sae.sae import SAE

DENSITY_EDGES = [quarter / 4 for quarter in range(-24, 1)]
"""Bins of log10 of the share of rows on which a latent fires; rarer latents count into the first bin."""
COSINE_EDGES = [twentieth / 20 for twentieth in range(-20, 21)]


class Reconstruction:
    """Sums over rows, so that every ratio is one of sums, never a mean of ratios. Call `update`, then `compute`."""

    def __init__(self, sae: SAE):
        self.sae = sae
        d_sae, d_in = sae.W_dec_FD.shape
        self.rows = 0
        zero = partial(torch.zeros, dtype=torch.float64, device=sae.device)
        self.squared_error, self.squared_norm, self.cosine = zero(()), zero(()), zero(())
        self.directed = torch.zeros((), dtype=torch.int64, device=sae.device)
        """Rows that are not 0, which have a direction; a synthetic model draws some that are."""
        self.reconstructed = zero(())
        """Sum over rows of ||x^ - b_dec||^2."""
        self.sum_D = zero(d_in)
        self.fired_F = torch.zeros(d_sae, dtype=torch.int64, device=sae.device)

    def update(self, x_BD: torch.Tensor, latents: SparseLatents) -> None:
        """Take in rows and their latents."""
        reconstructed_BD = latents.decoded(self.sae)
        self.rows += len(x_BD)
        self.squared_error += (x_BD - reconstructed_BD).square().sum(dtype=torch.float64)
        self.squared_norm += x_BD.square().sum(dtype=torch.float64)
        self.reconstructed += (reconstructed_BD - self.sae.b_dec_D).square().sum(dtype=torch.float64)
        directed_B = x_BD.any(dim=1)
        self.directed += directed_B.sum()
        cosine_B = torch.nn.functional.cosine_similarity(x_BD, reconstructed_BD)
        self.cosine += cosine_B[directed_B].sum(dtype=torch.float64)
        self.sum_D += x_BD.sum(dim=0, dtype=torch.float64)
        self.fired_F += latents.fired_F()

    @property
    def l0(self) -> float:
        """Mean number of latents that fire on a row."""
        return float(self.fired_F.sum() / self.rows)

    def compute(self) -> dict[str, Any]:
        """The metrics, over all rows seen.

        fvu: squared error over variance around the mean row, 0 is perfect and 1 is predicting the mean; explained_variance
        is 1 - fvu. cosine: mean cosine of row and reconstruction, of rows that are not 0. l0: mean number of latents that
        fire on a row. dead_fraction: share of latents that fire on no row. max_decoder_cosine: mean over latents of the
        largest cosine to another latent's decoder direction. density, decoder_cosine: histograms. Raises DegenerateSAEError
        when reconstructions are not finite.
        """
        if not self.squared_error.isfinite():
            raise DegenerateSAEError("its reconstructions of held-out rows are not finite")
        variance = self.squared_norm - self.sum_D.square().sum() / self.rows
        fvu = float(self.squared_error / variance)
        return {
            "rows": self.rows,
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            **{name: metric(self) for name, metric in METRICS.items()},
            "density": self._density(),
            **decoder_cosines(self.sae.W_dec_FD),
        }

    def _density(self) -> dict[str, Any]:
        alive = self.fired_F[self.fired_F > 0].double()
        counts = histogram((alive / self.rows).log10(), DENSITY_EDGES)
        return {"edges": DENSITY_EDGES, "counts": counts.tolist(), "dead": len(self.fired_F) - len(alive)}


METRICS: dict[str, Callable[[Reconstruction], float]] = {
    "cosine": lambda seen: float(seen.cosine / seen.directed.clamp(min=1)),
    "l0": lambda seen: seen.l0,
    "dead_fraction": lambda seen: float((seen.fired_F == 0).double().mean()),
}
"""Numbers in `reconstruction.json` that follow from the sums over rows. Each must be finite."""


def measure_reconstruction(on: Bench) -> Reconstruction:
    """The sums over all held-out rows."""
    sums = Reconstruction(on.sae)
    for x_BD, latents in on.latents.with_rows():
        sums.update(x_BD, latents)
    return sums


def compute(on: Bench) -> dict[str, Any]:
    """The content of `reconstruction.json` (docs/evaluation-files.md)."""
    return on.once(measure_reconstruction).compute()


def decoder_cosines(W_dec_FD: torch.Tensor) -> dict[str, Any]:
    """Mean of the largest cosine of every decoder direction to another, and the histogram over unordered pairs."""
    largest: list[torch.Tensor] = []
    counts = torch.zeros(len(COSINE_EDGES) - 1, dtype=torch.int64, device=W_dec_FD.device)
    for block in blocks_of(len(W_dec_FD)):
        cosine_bF = W_dec_FD[block] @ W_dec_FD.T
        cosine_bF.diagonal(block.start).fill_(-torch.inf)
        largest.append(cosine_bF.max(dim=1).values)
        higher_bF = torch.ones_like(cosine_bF, dtype=torch.bool).triu_(block.start + 1)
        counts += histogram(cosine_bF[higher_bF], COSINE_EDGES)
    return {
        "max_decoder_cosine": float(torch.cat(largest).mean()),
        "decoder_cosine": {"edges": COSINE_EDGES, "counts": counts.tolist()},
    }


def histogram(values: torch.Tensor, edges: list[float]) -> torch.Tensor:
    """int64 counts. A bin includes its lower edge, the last also its upper; values outside count into the nearest bin."""
    bins = torch.bucketize(values, torch.tensor(edges[1:-1], dtype=values.dtype, device=values.device), right=True)
    return bins.bincount(minlength=len(edges) - 1)
