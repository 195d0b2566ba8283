"""Says, before any training, what its recipes and the rows of the store do not allow."""

import sys
from collections.abc import Mapping

from pipeline.store.batches import split_shards
from pipeline.store.reader import ActivationStore
from pipeline.study.experiment import Experiment
from pipeline.study.recipe import TrainConfig


def check_rows(store: ActivationStore, experiment: Experiment) -> None:
    """Say how often training goes through the rows, if more than once.

    Raises what `split_shards` does.
    """
    recipe = experiment.train
    training = store.rows_of(split_shards(store, recipe.heldout_shards, recipe.heldout_within)[0])
    rows = store.rows_of(store.every_shard)
    passes = recipe.steps * recipe.batch_size / training
    if passes > 1:
        asked = f" of the {experiment.store.tokens:,} asked for" if rows < experiment.store.tokens else ""
        again = "" if store.layout.kept is None else ", and a stream makes its rows on each again"
        print(
            f"the store holds {rows:,} rows{asked}: training takes {passes:.1f} passes over the {training:,} that are "
            f"not held out{again}",
            file=sys.stderr,
        )


def tell_of_no_resets(recipes: Mapping[str, TrainConfig]) -> None:
    """Name each arm that resets dead latents, but first so late that training ends before."""
    for arm, recipe in recipes.items():
        if recipe.resets and not recipe.ever_resets:
            print(
                f"{arm}: dead latents are never reset: the first reset, at step {recipe.resets.first:,}, would leave less "
                f"than {recipe.resets.every:,} of the {recipe.steps:,} steps",
                file=sys.stderr,
            )
