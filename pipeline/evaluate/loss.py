"""Measures the language model's loss with an SAE's reconstructions in place of its residual stream."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch

from pipeline.evaluate.bench import Bench, LayerBench, Missing
from pipeline.models.language import LanguageModel
from pipeline.sae.sae import SAE
from pipeline.store.reader import ActivationStore
from pipeline.study.evaluations import Need

SEQUENCES_AT_ONCE = 4
"""Bounds the logits, the largest tensor: 0.5 GB for 4 sequences of 128 tokens with Gemma's vocabulary of 256,000."""


def heldout_sequences(store: ActivationStore, shards: list[int], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first sequences all of whose rows are in `shards`, a run of shards: enough sequences to hold `tokens` rows.

    Returns their tokens, int64 [S, L], and which of them are rows of the store, bool [S, L]: special tokens are not, nor
    those that `store.max_norm` left out.
    """
    offsets = store.array("row_offsets")
    start = offsets.searchsorted(store.row_range(shards[0])[0])
    enough = offsets.searchsorted(int(offsets.read(start, start + 1)[0]) + tokens)
    complete = offsets.searchsorted(store.layout.shard_range(shards[-1])[1], side="right") - 1
    stop = max(start, min(enough, complete))
    tokens_SL = torch.from_numpy(store.array("tokens").read(start, stop)).long()
    rows_SL = torch.zeros(tokens_SL.shape, dtype=torch.bool)
    for shard in shards:
        sequence_R, position_R = (store.read_field(name, *store.row_range(shard)) for name in ("sequence", "position"))
        wanted_R = (sequence_R >= start) & (sequence_R < stop)
        rows_SL[torch.from_numpy(sequence_R[wanted_R] - start).long(), torch.from_numpy(position_R[wanted_R]).long()] = True
    return tokens_SL, rows_SL


class SplicedLoss:
    """Losses of one model at one layer on the same sequences, for any number of SAEs.

    The residual stream is replaced by reconstructions, zeros or the mean row, only at tokens that are rows of the store: no
    SAE was trained on BOS, on other special tokens or on what `store.max_norm` left out. Losses are means over the same
    tokens as targets.
    """

    def __init__(
        self, model: LanguageModel, layer: int, tokens_SL: torch.Tensor, rows_SL: torch.Tensor, mean_D: torch.Tensor
    ):
        self.model, self.layer, self.tokens_SL, self.rows_SL, self.mean_D = model, layer, tokens_SL, rows_SL, mean_D

    @cached_property
    def clean(self) -> float:
        """Loss of the model as it is, in nats per token."""
        return self._loss(lambda x_SLD: x_SLD)

    @cached_property
    def zero(self) -> float:
        """Loss with zeros in place of the stream."""
        return self._loss(torch.zeros_like)

    @cached_property
    def mean(self) -> float:
        """Loss with the mean held-out row in place of the stream."""
        return self._loss(lambda x_SLD: self.mean_D.to(x_SLD).expand_as(x_SLD))

    def compute(self, sae: SAE) -> dict[str, Any]:
        """The content of `loss.json` for an SAE of this layer."""
        spliced = self._loss(lambda x_SLD: sae.decode(sae.encode(x_SLD.to(sae.device))).to(x_SLD))
        recovered: dict[str, float | None] = {}
        reasons: list[str] = []
        for name, ablated in (("zero", self.zero), ("mean", self.mean)):
            recovered[name] = (ablated - spliced) / (ablated - self.clean) if ablated > self.clean else None
            if recovered[name] is None:
                reasons.append(f"{name} ablation does not raise the loss")
        return {
            "sequences": len(self.tokens_SL),
            "tokens": int(self.rows_SL[:, 1:].sum()),
            "clean": self.clean,
            "sae": spliced,
            "zero": self.zero,
            "mean": self.mean,
            "recovered": recovered,
            "reason": "; ".join(reasons) or None,
        }

    def _loss(self, replacement: Callable[[torch.Tensor], torch.Tensor]) -> float:
        total = 0.0
        batches = (torch.split(whole_SL, SEQUENCES_AT_ONCE) for whole_SL in (self.tokens_SL, self.rows_SL))
        for tokens_SL, rows_SL in zip(*batches, strict=True):

            def replace(x_SLD: torch.Tensor, rows_SL: torch.Tensor = rows_SL) -> torch.Tensor:
                return torch.where(rows_SL.to(x_SLD.device)[:, :, None], replacement(x_SLD), x_SLD)

            loss_SL = self.model.next_token_loss(tokens_SL, self.layer, replace)
            total += float(loss_SL[rows_SL[:, 1:]].sum(dtype=torch.float64))
        return total / int(self.rows_SL[:, 1:].sum())


def spliced_loss(layer: LayerBench) -> SplicedLoss | Missing:
    """The model and the held-out sequences on which the SAEs of a layer are compared."""
    tokens = layer.experiment.evaluate.loss_tokens
    if Need.model not in layer.has:
        return Missing("a synthetic model has no loss")
    if not tokens:
        return Missing("evaluate.loss_tokens is 0")
    tokens_SL, rows_SL = heldout_sequences(layer.store, layer.heldout_shards, tokens)
    if not len(tokens_SL):
        return Missing("no whole sequence is held out")
    return SplicedLoss(layer.language_model, layer.layer, tokens_SL, rows_SL, layer.rows.mean_D())


def compute(on: Bench) -> dict[str, Any]:
    """The content of `loss.json` (docs/evaluation-files.md)."""
    spliced = on.layer.once(spliced_loss)
    if isinstance(spliced, Missing):
        values = dict.fromkeys(("sequences", "tokens", "clean", "sae", "zero", "mean"))
        return values | {"recovered": {"zero": None, "mean": None}, "reason": spliced.reason}
    return spliced.compute(on.sae)
