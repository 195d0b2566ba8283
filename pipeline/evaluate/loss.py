"""The language model's own loss with an SAE's reconstructions in place of its residual stream.

Shapes: S sequences, L tokens, D d_in.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch

from pipeline.models.language import LanguageModel
from pipeline.sae.sae import SAE
from pipeline.store.reader import ActivationStore

SEQUENCES_AT_ONCE = 4
"""A large vocabulary makes logits the largest tensor there is: 4 sequences of 128 take 0.5 GB at Gemma's 256,000."""


def heldout_sequences(store: ActivationStore, shards: list[int], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first sequences all of whose rows are in `shards`, until they hold `tokens` rows.

    Tokens, int64 [S, L], and which of them are rows of the store, bool [S, L]: no special ones, and none that
    `store.max_norm` left out.
    """
    offsets = store.whole("row_offsets")
    start = int(np.searchsorted(offsets, store.row_range(shards[0])[0]))
    enough = int(np.searchsorted(offsets, offsets[start] + tokens))
    complete = int(np.searchsorted(offsets, store.layout.rows, side="right")) - 1
    stop = min(enough, complete)
    tokens_SL = torch.from_numpy(store.whole("tokens")[start:stop]).long()
    rows_SL = torch.zeros(tokens_SL.shape, dtype=torch.bool)
    for shard in shards:
        sequence_R, position_R = (store.read_field(name, *store.row_range(shard)) for name in ("sequence", "position"))
        wanted_R = (sequence_R >= start) & (sequence_R < stop)
        rows_SL[torch.from_numpy(sequence_R[wanted_R] - start).long(), torch.from_numpy(position_R[wanted_R]).long()] = True
    return tokens_SL, rows_SL


class SplicedLoss:
    """Losses of one model at one layer on the same sequences, for any number of SAEs.

    Only at tokens that are rows of the store is the residual stream replaced, by reconstructions, zeros or the mean row.
    BOS, other special tokens and what `store.max_norm` left out keep theirs, since no SAE was trained on them. Losses are
    means over the same tokens as targets.
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
        """Loss with zeros."""
        return self._loss(torch.zeros_like)

    @cached_property
    def mean(self) -> float:
        """Loss with the mean row."""
        return self._loss(lambda x_SLD: self.mean_D.to(x_SLD).expand_as(x_SLD))

    def compute(self, sae: SAE) -> dict[str, Any]:
        """What docs/evaluation-files.md lists for `loss.json`."""
        spliced = self._loss(lambda x_SLD: sae.decode(sae.encode(x_SLD.cpu())).to(x_SLD))
        recovered, reasons = {}, []
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
        for tokens_SL, rows_SL in zip(
            self.tokens_SL.split(SEQUENCES_AT_ONCE), self.rows_SL.split(SEQUENCES_AT_ONCE), strict=True
        ):

            def replace(x_SLD: torch.Tensor, rows_SL: torch.Tensor = rows_SL) -> torch.Tensor:
                return torch.where(rows_SL.to(x_SLD.device)[:, :, None], replacement(x_SLD), x_SLD)

            loss_SL = self.model.next_token_loss(tokens_SL, self.layer, replace)
            total += float(loss_SL[rows_SL[:, 1:]].sum(dtype=torch.float64))
        return total / int(self.rows_SL[:, 1:].sum())


def not_measured(reason: str) -> dict[str, Any]:
    """`loss.json` where there is no loss to measure."""
    values = dict.fromkeys(("sequences", "tokens", "clean", "sae", "zero", "mean"))
    return values | {"recovered": {"zero": None, "mean": None}, "reason": reason}
