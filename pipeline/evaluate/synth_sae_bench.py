"""Measures an SAE by SAELens' own metrics for synthetic models, those of SynthSAEBench (arXiv 2602.14687)."""

from collections.abc import Iterator
from typing import Any

import torch

from pipeline.evaluate.bench import Bench
from pipeline.evaluate.recovery import true_features
from pipeline.models.saelens_model import SAELensTruth
from pipeline.runtime.compatibility import importing_sae_bench
from pipeline.runtime.devices import CPU
from pipeline.sae.sae import SAE


class AsSAELens:
    """One of our SAEs with the names that `eval_sae_on_synthetic_data` uses."""

    def __init__(self, sae: SAE):
        self.W_dec, self.encode, self.decode = sae.W_dec_FD, sae.encode, sae.decode

    def eval(self) -> None:
        """A finished SAE is always in inference mode."""


class Replayed:
    """Takes the place of an `ActivationGenerator`: gives the same feature activations [B, T] in the same order each time."""

    def __init__(self, chunks: Iterator[torch.Tensor]):
        self.chunks = chunks

    def sample(self, rows: int) -> torch.Tensor:
        """The next chunk, which must have as many rows."""
        f_BT = next(self.chunks)
        assert len(f_BT) == rows
        return f_BT


def saelens_metrics(sae: Any, truth: SAELensTruth, chunks: Iterator[torch.Tensor], *, rows: int, chunk_rows: int) -> Any:
    """`eval_sae_on_synthetic_data` on given feature activations: `rows` of them, in chunks of `chunk_rows`.

    `sae` is one of SAELens or an `AsSAELens`, on the CPU. It reads rows that are not rounded to a store's dtype.
    """
    with importing_sae_bench():
        from sae_lens.synthetic import eval_sae_on_synthetic_data

    generator: Any = Replayed(chunks)
    return eval_sae_on_synthetic_data(sae, truth.model.feature_dict, generator, num_samples=rows, batch_size=chunk_rows)


def compute(on: Bench) -> dict[str, Any]:
    """The content of `synth_sae_bench.json` (docs/evaluation-files.md)."""
    truth, layout = on.layer.truth, on.layer.store.layout
    assert isinstance(truth, SAELensTruth)
    true = on.layer.once(true_features)
    chunks = (chunk.dense() for chunk in true)
    rows = sum(map(len, true))
    result = saelens_metrics(AsSAELens(on.sae.to(CPU)), truth, chunks, rows=rows, chunk_rows=layout.chunk_rows)
    return {"rows": rows, **result.to_dict()}
