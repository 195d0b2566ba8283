"""The truth behind synthetic activations: features planted once, saved as an artefact, drawn again for any shard at will.

Which features fire and how strongly is drawn by `sae_lens.synthetic`; its input is built here rather than at random by its
own configuration, so that every correlated pair and every child is known. Shapes: T true features, P correlated pairs,
B rows, D d_in.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from pipeline.models.model_section import SyntheticModel
from pipeline.runtime.compatibility import importing_sae_bench
from pipeline.store.format import Layout

if TYPE_CHECKING:
    from sae_lens.synthetic import ActivationGenerator

FEATURES = "features.safetensors"
NO_PARENT = -1


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """All that determines the distribution of the rows. Features are numbered as `SyntheticModel` says."""

    direction_TD: torch.Tensor
    """Unit rows: a row of the store is the sum of the directions of the features that fire, times how strongly they do."""
    probability_T: torch.Tensor
    """Probability with which each feature fires on a row, its parent's included."""
    magnitude_std_T: torch.Tensor
    """Standard deviation of a firing feature's magnitude around 1, cut off at 0."""
    parent_T: torch.Tensor
    """int64: the feature without which this one never fires, or NO_PARENT."""
    pair_P2: torch.Tensor
    """int64: the two features of each correlated pair."""
    correlation_P: torch.Tensor
    """Correlation of the normal variables behind each pair."""

    @classmethod
    def plant(cls, config: SyntheticModel) -> Self:
        """The features that a configuration describes; equal configurations give equal tensors."""
        with importing_sae_bench():  # which imports sae_lens too, and must find it imported under its own conditions
            from sae_lens.synthetic import zipfian_firing_probabilities

        parents, children, pairs = config.parents, config.children, config.correlated_pairs
        parent_T = torch.full((config.features,), NO_PARENT)
        first_pair = parents * (1 + children)
        parent_T[parents:first_pair] = torch.arange(parents).repeat_interleave(children)
        pair_P2 = first_pair + torch.arange(2 * pairs).reshape(pairs, 2)
        child_T = (parent_T != NO_PARENT).nonzero().squeeze(1)

        # numpy's generator, because SAEs are initialised from torch's: with the same seed, one would start at the solution.
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
        """Write FEATURES, one tensor per field."""
        save_file({name: tensor.contiguous() for name, tensor in vars(self).items()}, folder / FEATURES)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        return cls(**load_file(path))

    def draw(self, layout: Layout, shard: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The feature activations [B, T] and rows [B, D] of a shard, float32, in the store's order, chunk by chunk.

        This is what fills a store, so calling it again gives the true features behind its rows (which are rounded to the
        store's dtype). Nothing counts but the arguments: neither other shards, nor the caller's random state, nor the number
        of cores.
        """
        start, stop = layout.shard_range(shard)
        for first in range(start, stop, layout.chunk_rows):
            with _reproducible(layout.seed, first):
                f_BT = self._generator.sample(min(layout.chunk_rows, stop - first))
                x_BD = f_BT @ self.direction_TD
            yield f_BT, x_BD

    @cached_property
    def _generator(self) -> "ActivationGenerator":
        with importing_sae_bench():
            from sae_lens.synthetic import ActivationGenerator, HierarchyNode, hierarchy_modifier

        child_T = (self.parent_T != NO_PARENT).nonzero().squeeze(1)
        roots = [
            HierarchyNode(int(parent), [HierarchyNode(int(child)) for child in child_T[self.parent_T[child_T] == parent]])
            for parent in self.parent_T[child_T].unique()
        ]
        probability_T = self.probability_T.clone()
        # The library silences a child where its parent is silent, so the child has to be drawn more often than it fires.
        probability_T[child_T] /= self.probability_T[self.parent_T[child_T]]
        return ActivationGenerator(
            num_features=len(probability_T),
            firing_probabilities=probability_T,
            std_firing_magnitudes=self.magnitude_std_T,
            modify_activations=hierarchy_modifier(roots) if roots else None,
            correlation_matrix=self._correlation() if len(self.pair_P2) else None,
        )

    def _correlation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """In sae_lens' low-rank form, a factor [T, P] and the rest of the diagonal [T]: a normal variable per pair."""
        pairs = torch.arange(len(self.pair_P2))
        factor_TP = torch.zeros(len(self.parent_T), len(pairs))
        factor_TP[self.pair_P2[:, 0], pairs] = self.correlation_P.abs().sqrt()
        factor_TP[self.pair_P2[:, 1], pairs] = self.correlation_P.abs().sqrt() * self.correlation_P.sign()
        return factor_TP, 1 - factor_TP.square().sum(dim=1)


def make_synthetic_model(config: SyntheticModel, folder: Path) -> dict[str, Any]:
    """Plant the features and save them into `folder`; returns facts about them."""
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


def _turned_towards(direction_BD: torch.Tensor, towards_BD: torch.Tensor, cosine: float) -> torch.Tensor:
    """Unit directions [B, D] in the plane of both arguments, at the given cosine to the second."""
    across_BD = direction_BD - (direction_BD * towards_BD).sum(dim=1, keepdim=True) * towards_BD
    return cosine * towards_BD + math.sqrt(1 - cosine**2) * torch.nn.functional.normalize(across_BD, dim=1)


@contextmanager
def _reproducible(*seed: int) -> Iterator[None]:
    """Random numbers from `seed` alone and sums in one thread, because the library draws from torch's global state."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]))
            yield
    finally:
        torch.set_num_threads(threads)
