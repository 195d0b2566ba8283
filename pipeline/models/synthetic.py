"""Plants the true features of a synthetic model, saves them, and draws the rows of any shard from them.

`sae_lens.synthetic` draws which features fire and how strongly. Its own configuration would choose children and correlated
pairs at random; here they are chosen explicitly, so that each is known. `saelens_model` has models of its own configuration.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import safetensors.torch
import torch

from pipeline.models.model_section import SyntheticModel
from pipeline.runtime.compatibility import importing_sae_bench
from pipeline.runtime.threads import one_thread
from pipeline.store.format import Layout

if TYPE_CHECKING:
    from sae_lens.synthetic import ActivationGenerator

FEATURES = "features.safetensors"
NO_PARENT = -1


class Truth(ABC):
    """True features, and the rows that are made of them."""

    direction_TD: torch.Tensor
    """Unit directions: a row of the store is the sum of the firing features' directions, each times its strength."""
    parent_T: torch.Tensor
    """int64: each feature's parent, without which it never fires, or NO_PARENT."""
    pair_P2: torch.Tensor
    """int64: the two features of each correlated pair that was planted."""

    @abstractmethod
    def sample(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Feature activations [B, T] and the rows [B, D] made of them, float32, drawn from torch's global generator."""

    def draw(self, layout: Layout, shard: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The feature activations [B, T] and rows [B, D] of a shard, float32, in the store's order, chunk by chunk.

        Extraction fills the store with these rows, rounded to the store's dtype; calling this again gives the features
        behind them. The result depends only on the arguments, not on other shards, the caller's random state or the number
        of cores.
        """
        start, stop = layout.shard_range(shard)
        for first in range(start, stop, layout.chunk_rows):
            with one_thread(), _seeded(layout.seed, first):
                drawn = self.sample(min(layout.chunk_rows, stop - first))
            yield drawn


@dataclass(frozen=True, kw_only=True)
class GroundTruth(Truth):
    """The parameters of the distribution of rows. `SyntheticModel` says how features are numbered."""

    direction_TD: torch.Tensor
    probability_T: torch.Tensor
    """Probability that each feature fires on a row; for a child, that it fires together with its parent."""
    magnitude_std_T: torch.Tensor
    """Standard deviation of a firing feature's strength; the mean is 1, and negative strengths are cut to 0."""
    parent_T: torch.Tensor
    pair_P2: torch.Tensor
    correlation_P: torch.Tensor
    """Correlation of the two normal variables that decide whether the features of each pair fire."""

    @classmethod
    def plant(cls, config: SyntheticModel) -> Self:
        """The features of a configuration; equal configurations give equal tensors."""
        with importing_sae_bench():  # sae-bench imports sae_lens too, and needs its checks to be off
            from sae_lens.synthetic import zipfian_firing_probabilities

        parents, children, pairs = config.parents, config.children, config.correlated_pairs
        parent_T = torch.full((config.features,), NO_PARENT)
        first_pair = parents * (1 + children)
        parent_T[parents:first_pair] = torch.arange(parents).repeat_interleave(children)
        pair_P2 = first_pair + torch.arange(2 * pairs).reshape(pairs, 2)
        child_T = (parent_T != NO_PARENT).nonzero().squeeze(1)

        # numpy's generator, because SAEs are initialised from torch's: with equal seeds, an SAE would start at the solution.
        normal_TD = np.random.default_rng(config.seed).standard_normal((config.features, config.d_in), dtype=np.float32)
        direction_TD = torch.nn.functional.normalize(torch.from_numpy(normal_TD), dim=1)
        for features, like in ((child_T, parent_T[child_T]), (pair_P2[:, 1], pair_P2[:, 0])):
            direction_TD[features] = _turned_towards(direction_TD[features], direction_TD[like], config.similarity)
        return cls(
            direction_TD=direction_TD,
            probability_T=zipfian_firing_probabilities(
                config.features,
                exponent=config.zipf_exponent,
                max_prob=config.max_probability,
                min_prob=config.min_probability,
            ),
            magnitude_std_T=torch.full((config.features,), config.magnitude_std),
            parent_T=parent_T,
            pair_P2=pair_P2,
            correlation_P=torch.full((pairs,), config.correlation),
        )

    def save(self, folder: Path) -> None:
        """Write the file FEATURES, one tensor per field."""
        safetensors.torch.save_file({name: tensor.contiguous() for name, tensor in vars(self).items()}, folder / FEATURES)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file that `save` wrote."""
        return cls(**safetensors.torch.load_file(path))

    def sample(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Feature activations [B, T] and the rows [B, D] made of them, float32, drawn from torch's global generator."""
        f_BT = self._generator.sample(rows)
        return f_BT, f_BT @ self.direction_TD

    @cached_property
    def _generator(self) -> "ActivationGenerator":
        with importing_sae_bench():
            from sae_lens.synthetic import ActivationGenerator, HierarchyNode, hierarchy_modifier

        child_T = (self.parent_T != NO_PARENT).nonzero().squeeze(1)
        children: dict[int, list[HierarchyNode]] = {}
        for child in map(int, child_T):
            children.setdefault(int(self.parent_T[child]), []).append(HierarchyNode(child))
        roots = [HierarchyNode(parent, nodes) for parent, nodes in children.items()]
        probability_T = self.probability_T.clone()
        # The library silences a child wherever its parent is silent, so a child must be drawn more often than it fires.
        probability_T[child_T] /= self.probability_T[self.parent_T[child_T]]
        return ActivationGenerator(
            num_features=len(probability_T),
            firing_probabilities=probability_T,
            std_firing_magnitudes=self.magnitude_std_T,
            modify_activations=hierarchy_modifier(roots) if roots else None,
            correlation_matrix=self._correlation() if len(self.pair_P2) else None,
        )

    def _correlation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The correlation matrix in sae_lens' low-rank form: loadings [T, P] on one variable per pair, residuals [T]."""
        pairs = torch.arange(len(self.pair_P2))
        loading_TP = torch.zeros(len(self.parent_T), len(pairs))
        loading_TP[self.pair_P2[:, 0], pairs] = self.correlation_P.abs().sqrt()
        loading_TP[self.pair_P2[:, 1], pairs] = self.correlation_P.abs().sqrt() * self.correlation_P.sign()
        return loading_TP, 1 - loading_TP.square().sum(dim=1)


def make_synthetic_model(config: SyntheticModel, folder: Path) -> dict[str, Any]:
    """Plant the features and save them in `folder`; returns facts for the manifest."""
    started = time.monotonic()
    truth = GroundTruth.plant(config)
    truth.save(folder)
    return {
        "features": config.features,
        "parents": config.parents,
        "children": config.parents * config.children,
        "correlated_pairs": config.correlated_pairs,
        "features_per_row": round(float(truth.probability_T.sum()), 2),
        "seconds": round(time.monotonic() - started, 1),
    }


def _turned_towards(direction_TD: torch.Tensor, towards_TD: torch.Tensor, cosine: float) -> torch.Tensor:
    """Unit directions in the plane of both arguments, at the given cosine to the second."""
    across_TD = direction_TD - (direction_TD * towards_TD).sum(dim=1, keepdim=True) * towards_TD
    return cosine * towards_TD + math.sqrt(1 - cosine**2) * torch.nn.functional.normalize(across_TD, dim=1)


@contextmanager
def _seeded(*seed: int) -> Generator[None]:
    """Inside the block, torch's global generator, which sae_lens draws from, starts from `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
        yield
