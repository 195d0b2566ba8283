"""A synthetic model in place of a language model: made like any other artefact, and extracted like any other.

Its store has the arrays of every store. A vocabulary of two stands in for text: BOS, and DRAWN for every row.
Shapes: R rows, D d_in.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline.extract.shards import ShardRows
from pipeline.ground_truth import FEATURES, GroundTruth
from pipeline.plan import Plan
from pipeline.sources import SyntheticModel
from pipeline.store import format as fmt
from pipeline.workspace import Workspace

BOS, DRAWN = 0, 1
"""Token ids."""


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


def open_synthetic_model(plan: Plan, workspace: Workspace) -> GroundTruth:
    """The features that `make_synthetic_model` planted for this study."""
    assert plan.model is not None
    return GroundTruth.load(workspace.verified(plan.model, FEATURES))


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
