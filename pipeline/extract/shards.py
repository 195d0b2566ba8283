"""From tokens to the rows of one shard, whatever other shards exist and whoever makes them.

Shapes: S sequences, L tokens per sequence, R rows, D d_in.
"""

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.models.language import ResidualStream
from pipeline.store import format as fmt
from pipeline.store.writer import row_norms


@dataclass(frozen=True, kw_only=True)
class ShardRows:
    """All that is written of one shard, in final row order."""

    layers: dict[int, torch.Tensor]
    """Each layer's rows [R, D] in the store's dtype, on the CPU."""
    fields: dict[str, np.ndarray]
    """Each of ROW_FIELDS, [R]."""


def run_shard(
    shard: int, layout: fmt.Layout, sequences: fmt.Sequences, model: ResidualStream, forward_batch: int
) -> ShardRows:
    """Run the model over the sequences that a shard's rows come from.

    Rows are numbered through all sequences in order, special tokens left out, so a shard may begin and end inside a
    sequence; that sequence is then run for both of its shards. The result depends on nothing but the arguments.
    """
    start, stop = layout.shard_range(shard)
    offsets, tokens_SL = sequences.row_offsets, sequences.tokens_SL
    first = int(np.searchsorted(offsets, start, side="right")) - 1
    last = int(np.searchsorted(offsets, stop, side="left"))
    real_SL = ~np.isin(tokens_SL[first:last], layout.special_ids)
    order_R = np.arange(stop - start)
    if layout.row_order == "shuffled":
        order_R = np.random.default_rng((layout.seed, shard)).permutation(stop - start)

    inside = slice(start - offsets[first], stop - offsets[first])
    sequence_R, position_R = (indices[inside][order_R] for indices in np.nonzero(real_SL))
    sequence_R = sequence_R + first
    flat_R = sequence_R.astype(np.int64) * tokens_SL.shape[1] + position_R
    fields = {
        "doc_id": np.searchsorted(sequences.doc_starts, flat_R, side="right") - 1,
        "sequence": sequence_R.astype(np.int32),
        "position": position_R.astype(np.int32),
        "token_id": tokens_SL[sequence_R, position_R],
    }

    dtype = fmt.BITS[layout.dtype].torch_dtype
    layers = {layer: torch.empty(stop - start, layout.d_in, dtype=dtype) for layer in layout.layers}
    place_R = torch.from_numpy(np.argsort(order_R))  # where each row, counted in the order of the text, ends up
    for batch in range(first, last, forward_batch):
        end = min(batch + forward_batch, last)
        outputs = model(torch.from_numpy(tokens_SL[batch:end]).long())
        # The rows of these sequences, and which of them belong to this shard.
        low, high = max(start, offsets[batch]), min(stop, offsets[end])
        wanted = real_SL[batch - first : end - first].ravel().nonzero()[0][low - offsets[batch] : high - offsets[batch]]
        wanted_R = torch.from_numpy(wanted).to(model.device)
        for layer, hidden_SLD in outputs.items():
            rows_RD = hidden_SLD.flatten(0, 1)[wanted_R].to("cpu", dtype)
            layers[layer].index_copy_(0, place_R[low - start : high - start], rows_RD)
    return _without_massive(ShardRows(layers=layers, fields=fields), layout.max_norm)


def _without_massive(rows: ShardRows, max_norm: float | None) -> ShardRows:
    """The rows that no layer gives a norm above `max_norm` times the median of that layer's rows here."""
    if max_norm is None:
        return rows
    norms = [row_norms(rows_RD) for rows_RD in rows.layers.values()]
    # NaN and infinity are kept: the writer is who names the sequence that they came from.
    massive_R = torch.stack([(norm_R > max_norm * norm_R.median()) & norm_R.isfinite() for norm_R in norms]).any(dim=0)
    kept = (~massive_R).nonzero().squeeze(1)
    return ShardRows(
        layers={layer: rows_RD[kept] for layer, rows_RD in rows.layers.items()},
        fields={name: values[kept.numpy()] for name, values in rows.fields.items()},
    )
