"""What names the artefacts of a model in a folder: the files that are loaded, and no others."""

from pathlib import Path

import pytest

from pipeline.errors import BadInputError
from pipeline.study.experiment import Experiment
from pipeline.study.plan import make_plan

TOML = """
description = "A model in a folder."
[model]
source = "huggingface"
name = "{folder}"
d_in = 32
depth = 2
[corpus]
source = "python"
[store]
layers = [1]
tokens = 20_000
context = 32
shard_rows = 4096
[probes]
datasets = ["python/text-kind"]
train_size = 80
test_size = 40
[train]
d_sae = 96
steps = 600
batch_size = 128
[study]
layers = [1]
seeds = [0]
arms = ["baseline", "full"]
"""


def store_key(folder: Path) -> str:
    toml = folder.parent / "model.toml"
    toml.write_text(TOML.format(folder=folder))
    return make_plan(Experiment.load(str(toml))).store.key


def test_notes_beside_the_weights_rename_nothing_and_a_tokenizer_does(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"weights")
    before = store_key(folder)
    for name in ("notes.txt", "README.md", "training_args.bin"):
        (folder / name).write_text("of mine")
    assert store_key(folder) == before
    (folder / "merges.txt").write_text("a b")
    assert store_key(folder) != before


def test_a_link_to_nothing_in_a_model_folder_is_said(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").symlink_to(tmp_path / "gone")
    with pytest.raises(BadInputError, match=r"config\.json is a link to nothing: restore what it links to, or remove it"):
        store_key(folder)
