"""A synthetic model in place of a language model: made like any other artefact, and extracted like any other.

Its store has the arrays of every store. A vocabulary of two stands in for text: BOS, and DRAWN for every row.
Shapes: R rows, D d_in.
"""

import numpy as np
import torch

from pipeline.extract.shards import ShardRows
from pipeline.models.synthetic import GroundTruth
from pipeline.store import format as fmt
from pipeline.study.plan import Plan

BOS, DRAWN = 0, 1
"""Token ids."""


def synthetic_store(plan: Plan) -> fmt.NewStore:
    """An empty store with a token for every row to come; rows are independent draws, so there is no order to shuffle."""
    config = plan.experiment.store
    layout = fmt.Layout(
        rows=config.tokens,
        shard_rows=config.shard_rows,
        chunk_rows=config.chunk_rows,
        layers=config.layers,
        d_in=plan.experiment.model.d_in,
        dtype=config.dtype,
        codec=config.codec,
        row_order="document",
        seed=config.seed,
        special_ids=(BOS,),
        provenance=dict(plan.store.inputs),
    )
    drawn = config.context - 1
    tokens_SL = np.full((-(-config.tokens // drawn), config.context), DRAWN, dtype=np.int32)
    tokens_SL[:, 0] = BOS
    sequences = np.arange(len(tokens_SL) + 1, dtype=np.int64)
    return fmt.NewStore(
        layout=layout,
        sequences=fmt.Sequences(
            tokens_SL=tokens_SL, row_offsets=sequences * drawn, doc_starts=sequences[:-1] * config.context + 1
        ),
    )


def synthetic_rows(truth: GroundTruth, layout: fmt.Layout, sequences: fmt.Sequences, shard: int) -> ShardRows:
    """Draw the rows of one shard: they depend on the arguments and nothing else (`GroundTruth.draw`)."""
    dtype = fmt.BITS[layout.dtype].torch_dtype
    rows_RD = torch.cat([x_BD.to(dtype) for _, x_BD in truth.draw(layout, shard)])
    sequence_R, place_R = np.divmod(np.arange(*layout.shard_range(shard)), sequences.tokens_SL.shape[1] - 1)
    fields = {
        "doc_id": sequence_R,
        "sequence": sequence_R,
        "position": place_R + 1,
        "token_id": np.full(len(rows_RD), DRAWN),
    }
    return ShardRows(layers={layout.layers[0]: rows_RD}, fields=fields)
