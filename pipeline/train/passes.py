"""Compares what a recipe takes of a store with what the store holds, before any training."""

import sys
from collections.abc import Iterable

from pipeline.errors import BadInputError
from pipeline.store.batches import split_shards
from pipeline.store.reader import ActivationStore
from pipeline.study.experiment import Experiment
from pipeline.study.recipe import FEWEST_HELDOUT_ROWS


def check_rows(store: ActivationStore, experiment: Experiment) -> None:
    """Say how often training goes through the rows, if more than once.

    Raises BadInputError when nothing is left to train on, and for too few held-out rows.
    """
    recipe = experiment.train
    training, heldout = (_rows(store, shards) for shards in split_shards(store, recipe.heldout_shards))
    if heldout < FEWEST_HELDOUT_ROWS:
        raise BadInputError(
            f"train.heldout_shards {recipe.heldout_shards} holds out {heldout:,} rows of this store, and L0 and FVU need at "
            f"least {FEWEST_HELDOUT_ROWS}; hold out one shard more, or extract more tokens"
        )
    passes = recipe.steps * recipe.batch_size / training
    if passes > 1:
        asked = f" of the {experiment.store.tokens:,} asked for" if store.rows < experiment.store.tokens else ""
        print(
            f"the store holds {store.rows:,} rows{asked}: training takes {passes:.1f} passes over the {training:,} that are "
            f"not held out",
            file=sys.stderr,
        )


def _rows(store: ActivationStore, shards: Iterable[int]) -> int:
    return sum(store.commits[shard].rows for shard in shards)
