"""From tokens to the rows of one shard, whatever other shards exist and whoever makes them.

Shapes: S sequences, L tokens per sequence, R rows, D d_in.
"""

from dataclasses import dataclass

import numpy as np
import torch

from pipeline.extract.model import DTYPES, ResidualStream
from pipeline.store import format as fmt


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
    sequence_R, position_R = np.nonzero(real_SL)
    inside = slice(start - offsets[first], stop - offsets[first])
    sequence_R, position_R = sequence_R[inside] + first, position_R[inside]
    flat_R = sequence_R.astype(np.int64) * tokens_SL.shape[1] + position_R
    fields = {
        "doc_id": np.searchsorted(sequences.doc_starts, flat_R, side="right") - 1,
        "sequence": sequence_R.astype(np.int32),
        "position": position_R.astype(np.int32),
        "token_id": tokens_SL[sequence_R, position_R],
    }

    gathered: dict[int, list[torch.Tensor]] = {layer: [] for layer in layout.layers}
    for batch in range(first, last, forward_batch):
        end = min(batch + forward_batch, last)
        outputs = model(torch.from_numpy(tokens_SL[batch:end]).long())
        real = torch.from_numpy(real_SL[batch - first : end - first])
        for layer, hidden_SLD in outputs.items():
            gathered[layer].append(hidden_SLD[real.to(hidden_SLD.device)].to("cpu", DTYPES[layout.dtype]))
    layers = {layer: torch.cat(rows)[inside] for layer, rows in gathered.items()}

    if layout.row_order == "shuffled":
        order_R = np.random.default_rng((layout.seed, shard)).permutation(stop - start)
        fields = {name: values[order_R] for name, values in fields.items()}
        layers = {layer: rows_RD[torch.from_numpy(order_R)] for layer, rows_RD in layers.items()}
    return ShardRows(layers=layers, fields=fields)
