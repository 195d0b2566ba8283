"""Makes the store of a synthetic model: its tokens and layout, and the rows of any shard, drawn from known features.

The store has the same arrays as the store of a text. Its tokens mean nothing: BOS begins each sequence, and DRAWN is the
token of every row.
"""

import numpy as np
import torch

from pipeline.extract.new_stores import store_layout, with_kept
from pipeline.extract.shards import Text
from pipeline.models.synthetic import Truth
from pipeline.store import format as fmt
from pipeline.study.plan import Plan

BOS, DRAWN = 0, 1
"""Token ids."""


def synthetic_store(plan: Plan) -> fmt.NewStore:
    """An empty store with one token per row. Rows are independent draws, so their order needs no shuffling."""
    config = plan.experiment.store
    layout = store_layout(
        config,
        rows=config.tokens,
        d_in=plan.experiment.model.d_in,
        row_order="document",
        seed=config.seed,
        special_ids=(BOS,),
        provenance=plan.store.inputs,
    )
    drawn = config.context - 1
    tokens_SL = np.full((-(-config.tokens // drawn), config.context), DRAWN, dtype=np.int32)
    tokens_SL[:, 0] = BOS
    sequences = np.arange(len(tokens_SL) + 1, dtype=np.int64)
    return fmt.NewStore(
        layout=with_kept(layout, plan.experiment),
        sequences=fmt.Sequences(
            tokens_SL=tokens_SL, row_offsets=sequences * drawn, doc_starts=sequences[:-1] * config.context + 1
        ),
    )


def synthetic_rows(shard: int, layout: fmt.Layout, sequences: Text, truth: Truth) -> fmt.ShardRows:
    """Draw the rows of one shard. They depend only on the arguments (`Truth.draw`)."""
    dtype = fmt.BITS[layout.dtype].torch_dtype
    rows_RD = torch.cat([x_BD.to(dtype) for _, x_BD in truth.draw(layout, shard)])
    sequence_R, place_R = np.divmod(np.arange(*layout.shard_range(shard)), sequences.context - 1)
    fields = fmt.RowFields(
        doc_id=sequence_R, sequence=sequence_R, position=place_R + 1, token_id=np.full(len(rows_RD), DRAWN)
    )
    return fmt.ShardRows(layers={layout.layers[0]: rows_RD}, fields=fields)
