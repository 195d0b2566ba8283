"""What is said and refused before training, from the rows that a store really has."""

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from small_store import filled, numbered

from pipeline.errors import BadInputError
from pipeline.study.experiment import Experiment
from pipeline.study.recipe import Resets, TrainConfig
from pipeline.train.passes import check_rows, tell_of_no_resets

ROWS = 1024


def asking(steps: int, tokens: int = ROWS, **changes: int) -> Experiment:
    """An experiment that takes 64 rows a step and asked for so many tokens; every shard has 64 rows."""
    train = TrainConfig.model_validate({"d_sae": 8, "steps": steps, "batch_size": 64, "heldout_shards": 4} | changes)
    return cast("Experiment", SimpleNamespace(train=train, store=SimpleNamespace(tokens=tokens)))


def test_more_than_one_pass_is_said_with_what_was_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = filled(tmp_path, numbered(ROWS))
    check_rows(store, asking(steps=12))
    assert capsys.readouterr().err == ""
    check_rows(store, asking(steps=30))
    told = "the store holds 1,024 rows: training takes 2.5 passes over the 768 that are not held out\n"
    assert capsys.readouterr().err == told
    check_rows(store, asking(steps=192, tokens=1_000_000))
    told = "the store holds 1,024 rows of the 1,000,000 asked for: training takes 16.0 passes over the 768 that are"
    assert capsys.readouterr().err == f"{told} not held out\n"


def test_too_few_heldout_rows_are_refused(tmp_path: Path) -> None:
    store = filled(tmp_path, numbered(ROWS), kept={shard: 2 if shard == 15 else 64 for shard in range(16)})
    with pytest.raises(BadInputError, match=r"train\.heldout_shards 1 holds out 2 rows, and fewer than 256 measure nothing"):
        check_rows(store, asking(steps=12, heldout_shards=1))
    check_rows(store, asking(steps=10, heldout_shards=5))


def test_an_arm_whose_resets_never_come_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = TrainConfig(d_sae=8, steps=2_000)
    tell_of_no_resets({
        "full": recipe,
        "baseline": recipe.model_copy(update={"resets": None}),
        "warmup-2000": recipe.model_copy(update={"resets": Resets(first=2_000)}),
    })  # fmt: skip
    told = (
        "warmup-2000: dead latents are never reset: the first reset, at step 2,000, would leave less than 500 of the 2,000"
    )
    assert capsys.readouterr().err == f"{told} steps\n"
