"""Measures how far a difference in probing accuracy depends on which texts were drawn for the test.

Seeds and texts are crossed: every SAE is tested on the same texts. Defined in docs/method.md, "Differences between arms".
"""

import base64
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pipeline.report.frontier import Pair
from pipeline.report.results import Row

Numbers = npt.NDArray[np.float64]


def unpacked(text: str) -> Numbers:
    """The numbers that `probe_texts.json` holds as text."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<f4").astype(np.float64)


@dataclass(frozen=True)
class ProbeTexts:
    """What each test text adds to the probing scores of SAEs, read once for each."""

    _read: dict[tuple[str, str], list[Numbers]] = field(default_factory=dict[tuple[str, str], list[Numbers]])

    def of(self, row: Row, k: str) -> list[Numbers] | None:
        """One vector [S] for each data set; they add up to the score of probes with k latents. None where unknown."""
        if not row.probe_texts:
            return None
        if (row.sae, k) not in self._read:
            datasets = row.probe_texts.values()
            self._read[row.sae, k] = [unpacked(by_k[k]) / len(datasets) for by_k in datasets]
        return self._read[row.sae, k]

    def variance(self, pairs: Sequence[Pair], k: str) -> float | None:
        """Variance of the mean difference over seeds that comes from the texts and would stay with any number of seeds.

        None of fewer than two seeds, or where the texts of an SAE are unknown.
        """
        by_seed = [self._difference(pair, k) for pair in pairs]
        known = [difference for difference in by_seed if difference is not None]
        if len(known) < max(2, len(by_seed)):
            return None
        return max(0.0, sum(_variance(np.stack(of_dataset)) for of_dataset in zip(*known, strict=True)))

    def _difference(self, pair: Pair, k: str) -> list[Numbers] | None:
        """What each text adds to the difference, by data set."""
        sums: list[Numbers] | None = None
        for row, weight in pair.weights:
            found = self.of(row, k)
            if found is None:
                return None
            added = [weight * of_dataset for of_dataset in found]
            sums = added if sums is None else [one + other for one, other in zip(sums, added, strict=True)]
        return sums


def _variance(added_sT: Numbers) -> float:
    """Of the sum over texts of their mean over seeds, texts drawn anew, less what seeds and texts make together.

    The first is the variance of a bootstrap over texts, without its random draws. The second is counted in the spread over
    seeds; it is the mean square of the residuals of an analysis of variance by seed and text.
    """
    seeds, texts = added_sT.shape
    if texts < 2:
        return 0.0
    mean_T = added_sT.mean(axis=0)
    rest_sT = added_sT - mean_T - added_sT.mean(axis=1, keepdims=True) + mean_T.mean()
    drawn = float(((mean_T - mean_T.mean()) ** 2).sum())
    both = float((rest_sT**2).sum()) / (seeds - 1) / seeds
    return (drawn - both) * texts / (texts - 1)
