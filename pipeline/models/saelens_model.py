"""Builds a synthetic model by `sae_lens.synthetic` from its own configuration, and draws the rows of any shard from it."""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from pipeline.models.model_section import SAELensModel
from pipeline.models.synthetic import NO_PARENT, Truth
from pipeline.runtime.compatibility import importing_sae_bench, quiet_sae_bench

if TYPE_CHECKING:
    from sae_lens.synthetic import Hierarchy, SyntheticModel, SyntheticModelConfig

KINDS = ("firing_probability", "mean_firing_magnitudes", "std_firing_magnitudes")
"""Sections whose `kind` SAELens calls `generator_name`."""


class SAELensTruth(Truth):
    """A `sae_lens.synthetic.SyntheticModel`. Its correlations have no pairs: each feature is related to all a little."""

    def __init__(self, model: "SyntheticModel"):
        self.model = model
        self.direction_TD = model.feature_dict.feature_vectors.detach()
        self.parent_T = torch.full((model.cfg.num_features,), NO_PARENT)
        for parent, child in _edges(model.hierarchy):
            self.parent_T[child] = parent
        self.pair_P2 = torch.empty((0, 2), dtype=torch.int64)

    @classmethod
    def load(cls, folder: Path) -> "SAELensTruth":
        """Read what `make_saelens_model` wrote."""
        with importing_sae_bench():
            from sae_lens.synthetic import SyntheticModel

        return cls(SyntheticModel.load_from_disk(folder))

    def sample(self, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Feature activations [B, T] and the rows [B, D] made of them, float32, drawn from torch's global generator."""
        x_BD, f_BT = self.model.sample_with_features(rows)
        return f_BT, x_BD


def saelens_config(config: SAELensModel) -> "SyntheticModelConfig":
    """SAELens' own configuration of the model that the section [model] describes."""
    with importing_sae_bench():
        from sae_lens.synthetic import SyntheticModelConfig

    fields: dict[str, Any] = config.model_dump(exclude={"source"})
    for name in KINDS:
        fields[name]["generator_name"] = fields[name].pop("kind")
    return SyntheticModelConfig.from_dict(
        fields | {"num_features": fields.pop("features"), "hidden_dim": fields.pop("d_in"), "dtype": config.dtype}
    )


def make_saelens_model(config: SAELensModel, folder: Path) -> dict[str, Any]:
    """Build the model and save it in `folder` in SAELens' files; returns facts for the manifest."""
    started = time.monotonic()
    with importing_sae_bench():
        from sae_lens.synthetic import SyntheticModel

    steps = config.orthogonalization.num_steps if config.orthogonalization else 0
    print(f"drawing {config.features:,} features, {steps:,} steps to push them apart", file=sys.stderr)
    with quiet_sae_bench():
        model = SyntheticModel(saelens_config(config))
    model.save(folder)
    edges = list(_edges(model.hierarchy))
    return {
        "features": config.features,
        "parents": len({parent for parent, _ in edges}),
        "children": len(edges),
        "seconds": round(time.monotonic() - started, 1),
    }


def _edges(hierarchy: "Hierarchy | None") -> Iterator[tuple[int, int]]:
    """Each parent and child of the trees."""
    nodes = [*hierarchy.roots] if hierarchy else []
    while nodes:
        node = nodes.pop()
        nodes += node.children
        for child in node.children:
            if node.feature_index is not None and child.feature_index is not None:
                yield node.feature_index, child.feature_index
