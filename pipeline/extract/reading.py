"""Reads any text as extraction reads a corpus: returns its tokens and their activations, for the study's SAEs."""

from dataclasses import dataclass

import torch

from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError
from pipeline.extract.new_stores import store_layout
from pipeline.extract.shards import run_shard
from pipeline.study.plan import Plan
from pipeline.study.study_model import open_study_model
from pipeline.texts import packing


@dataclass(frozen=True, kw_only=True)
class Reading:
    """The R tokens of a text and their activations, without BOS and other special tokens, as in a store."""

    tokens: list[str]
    """The text of each token."""
    layers: dict[int, torch.Tensor]
    """Residual stream after each of the store's layers: float32 [R, D], on the CPU, unscaled, rounded as in the store."""


class TextReader:
    """The language model of a study, up to the deepest layer of its store. Call it with a text.

    Raises BadInputError for a synthetic model, which reads no text, MissingArtefactError for a model that the study has yet
    to train, and ModelAccessError for a model that cannot be loaded.
    """

    def __init__(self, plan: Plan, workspace: Workspace):
        self.experiment = plan.experiment
        self.model = open_study_model(plan, workspace)

    def __call__(self, text: str) -> Reading:
        """Read a text of at most `store.context` - 1 tokens, after a BOS, as in every sequence of the store.

        Raises BadInputError for a text without a token or with too many.
        """
        store, tokenizer = self.experiment.store, self.model.tokenizer
        count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if count >= store.context:
            raise BadInputError(
                f"the text has {count} tokens, a sequence of this study has room for {store.context - 1} after BOS: cut it"
            )
        special_ids = packing.special_ids(tokenizer)
        sequences = packing.pad([text], tokenizer, context=store.context, special_ids=special_ids)
        rows = sequences.rows
        one_shard = store.model_copy(update={"shard_rows": rows, "chunk_rows": rows})
        layout = store_layout(
            one_shard, rows=rows, d_in=self.model.d_in, row_order="document", special_ids=special_ids, provenance={}
        )
        read = run_shard(0, layout, sequences, self.model, forward_batch=1)
        return Reading(
            tokens=[tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in read.fields.token_id],
            layers={layer: rows_RD.float() for layer, rows_RD in read.layers.items()},
        )
