"""A text of one's own, read as extraction reads a corpus: tokens, and the activations that the study's SAEs take.

Shapes: R rows, one for each token of the text; D d_in.
"""

from dataclasses import dataclass

import torch

from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError
from pipeline.extract.shards import run_shard
from pipeline.store import format as fmt
from pipeline.study.plan import Plan
from pipeline.study.study_model import open_study_model
from pipeline.texts import packing


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A text's tokens and their activations. BOS and other special tokens are no rows, as in a store."""

    tokens: list[str]
    """The text of each token, R of them."""
    layers: dict[int, torch.Tensor]
    """Residual stream after each of the store's layers: float32 [R, D] on the CPU, unscaled, with the store's rounding."""


class TextReader:
    """The language model of a study, up to the deepest layer of its store. Call it with a text.

    Raises BadInputError for a synthetic model, which reads no text, MissingArtefactError when the study trains a model that
    is not trained yet, and ModelAccessError for one that cannot be loaded.
    """

    def __init__(self, plan: Plan, workspace: Workspace):
        self.experiment = plan.experiment
        self.model = open_study_model(plan, workspace)

    def __call__(self, text: str) -> Reading:
        """Read a text of at most `store.context` - 1 tokens: a BOS stands first, as in every sequence of the store.

        Raises BadInputError for a text without a token, or with more.
        """
        store, tokenizer = self.experiment.store, self.model.tokenizer
        count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        if count >= store.context:
            raise BadInputError(
                f"the text has {count} tokens, a sequence of this study has room for {store.context - 1} after BOS: cut it"
            )
        special_ids = sorted(set(tokenizer.all_special_ids))
        sequences = packing.pad([text], tokenizer, context=store.context, special_ids=special_ids)
        rows = int(sequences.row_offsets[-1])
        layout = fmt.Layout(
            rows=rows,
            shard_rows=rows,
            chunk_rows=rows,
            layers=store.layers,
            d_in=self.model.d_in,
            dtype=store.dtype,
            codec="raw",
            row_order="document",
            seed=0,
            special_ids=tuple(special_ids),
            provenance={},
        )
        read = run_shard(0, layout, sequences, self.model, forward_batch=1)
        return Reading(
            tokens=[tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in read.fields["token_id"]],
            layers={layer: rows_RD.float() for layer, rows_RD in read.layers.items()},
        )
