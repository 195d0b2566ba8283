"""A study of a small random model whose store grows: more tokens, other layers."""

from dataclasses import dataclass, replace
from pathlib import Path

from tiny_models import CONFIGS, save_model

from pipeline.study.experiment import Experiment
from pipeline.study.plan import Plan, make_plan

STUDY = """
description = "A store that grows."

[model]
source = "huggingface"
name = "{model}"
d_in = 32
depth = 4
dtype = "float32"

[corpus]
source = "files"
paths = ["{corpus}"]

[store]
layers = {layers}
tokens = {tokens}
context = 16
shard_rows = 256
chunk_rows = 64
forward_batch = 8
{more}

[probes]
datasets = ["python/docstring-of"]
train_size = 8
test_size = 8
context = 16

[train]
d_sae = 32
steps = 4
heldout_shards = 2
lr_warmup = 1
l1_warmup = 1
batch_size = 64
learning_rate = 1e-3

[study]
layers = [{study_layer}]
arms = ["baseline"]

[evaluate]
k_values = [1]
"""


@dataclass(frozen=True)
class Grown:
    """Where the studies of these tests have their model and their text."""

    folder: Path

    @classmethod
    def made(cls, folder: Path) -> "Grown":
        """With a new model and a new text in this folder."""
        save_model(folder / "model", CONFIGS["gemma-2"])
        lines = [f'{{"text": "{"".join(chr(97 + (n * k) % 26) for k in range(5 + n * 7 % 90))}"}}' for n in range(200)]
        (folder / "text.jsonl").write_text("\n".join(lines))
        return cls(folder)

    def plan(self, tokens: int, layers: tuple[int, ...], more: str = "") -> Plan:
        """A study of so many tokens and these layers, without its probe texts."""
        toml = self.folder / f"s{tokens}-{'-'.join(map(str, layers))}.toml"
        parts = {"model": self.folder / "model", "corpus": self.folder / "text.jsonl", "layers": list(layers)}
        toml.write_text(STUDY.format(**parts, tokens=tokens, more=more, study_layer=layers[0]))
        return replace(make_plan(Experiment.load(str(toml))), probes={})
