"""Makes the rows of one shard: runs the model over their tokens and puts the rows in the store's order."""

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from pipeline.models.language import ResidualStream
from pipeline.store import format as fmt
from pipeline.store.writer import activation_norms


class Text(Protocol):
    """The sequences of a store, in memory or on disk."""

    @property
    def context(self) -> int:
        """Tokens of a sequence."""
        ...

    def passage(self, start: int, stop: int) -> fmt.Passage:
        """The sequences that have the rows `start` to `stop` - 1."""
        ...


def run_shard(shard: int, layout: fmt.Layout, sequences: Text, model: ResidualStream, forward_batch: int) -> fmt.ShardRows:
    """Run the model over the sequences that a shard's rows come from.

    Rows are the tokens of all sequences in order, without special tokens, so a shard may begin and end inside a sequence;
    the model then runs over that sequence for both shards. The result depends only on the arguments.
    """
    start, stop = layout.shard_range(shard)
    passage = sequences.passage(start, stop)
    offsets, tokens_SL = passage.row_offsets, passage.tokens_SL
    real_SL = ~np.isin(tokens_SL, layout.special_ids)
    dtype = fmt.BITS[layout.dtype].torch_dtype
    # On the model's device, so that the host waits for it once a shard instead of once a batch and layer.
    layers = {layer: torch.empty(stop - start, layout.d_in, dtype=dtype, device=model.device) for layer in layout.layers}
    # The final place of each row, rows counted in the order of the text.
    place_R = torch.from_numpy(np.argsort(_order(shard, layout))).to(model.device)
    for batch in range(0, len(tokens_SL), forward_batch):
        end = min(batch + forward_batch, len(tokens_SL))
        outputs = model(torch.from_numpy(tokens_SL[batch:end]).long())
        # Which tokens of these sequences are rows of this shard.
        low, high = max(start, offsets[batch]), min(stop, offsets[end])
        wanted = real_SL[batch:end].ravel().nonzero()[0][low - offsets[batch] : high - offsets[batch]]
        wanted_R = torch.from_numpy(wanted).to(model.device)
        for layer, of_layer_RD in layers.items():
            rows_RD = outputs[layer].flatten(0, 1)[wanted_R].to(dtype)
            of_layer_RD.index_copy_(0, place_R[low - start : high - start], rows_RD)
    fields = row_fields(shard, layout, passage)
    rows = fmt.ShardRows(layers={layer: rows_RD.cpu() for layer, rows_RD in layers.items()}, fields=fields)
    return rows if layout.max_norm is None else _without_massive(rows, layout.max_norm)


def row_fields(shard: int, layout: fmt.Layout, passage: fmt.Passage) -> fmt.RowFields:
    """Which token of its passage each row of a shard belongs to, massive rows included. Needs no model."""
    start, stop = layout.shard_range(shard)
    offsets, tokens_SL = passage.row_offsets, passage.tokens_SL
    real_SL = ~np.isin(tokens_SL, layout.special_ids)
    inside, order_R = slice(start - offsets[0], stop - offsets[0]), _order(shard, layout)
    sequence_R, position_R = (indices[inside][order_R] for indices in np.nonzero(real_SL))
    flat_R = (passage.first + sequence_R.astype(np.int64)) * tokens_SL.shape[1] + position_R
    return fmt.RowFields(
        doc_id=passage.document + np.searchsorted(passage.doc_starts, flat_R, side="right") - 1,
        sequence=(passage.first + sequence_R).astype(np.int32),
        position=position_R.astype(np.int32),
        token_id=tokens_SL[sequence_R, position_R],
    )


def _order(shard: int, layout: fmt.Layout) -> npt.NDArray[np.int64]:
    """The number, in the order of the text, of each row of a shard as it is stored."""
    start, stop = layout.shard_range(shard)
    if layout.row_order == "shuffled":
        return np.random.default_rng((layout.seed, shard)).permutation(stop - start)
    return np.arange(stop - start)


def _without_massive(rows: fmt.ShardRows, max_norm: float) -> fmt.ShardRows:
    """Leave out rows whose norm, at any layer, is above `max_norm` times the median norm of the shard at that layer."""
    norms = [activation_norms(rows_RD) for rows_RD in rows.layers.values()]
    # Rows that are not finite stay, so that the writer refuses them and names their sequence.
    massive_R = torch.stack([(norm_R > max_norm * norm_R.median()) & norm_R.isfinite() for norm_R in norms]).any(dim=0)
    return rows.kept(~massive_R)
