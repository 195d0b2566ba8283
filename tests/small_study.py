"""A study small enough for a test: its experiment file, and what the `study` fixture hands out."""

from dataclasses import dataclass

from pipeline.artefacts.workspace import Workspace
from pipeline.study.experiment import Experiment
from pipeline.study.plan import Plan

SMALL = """
description = "A study small enough for a test."

[model]
source = "tiny"
steps = 150
batch_size = 8
vocabulary = 512

[corpus]
source = "python"

[store]
layers = [1, 2]
tokens = 20_000
context = 32
shard_rows = 4096
chunk_rows = 256

[probes]
datasets = ["python/text-kind", "python/docstring-of"]
train_size = 80
test_size = 40
context = 32

[train]
d_sae = 96
steps = 120
batch_size = 128
lr_warmup = 20
l1_warmup = 20
learning_rate = 1e-3

[train.resets]
every = 20
first = 40

[study]
layers = [2]
seeds = [0]
arms = ["baseline", "full", "magnitude"]

[evaluate]
k_values = [1, 5]
"""


@dataclass(frozen=True)
class Study:
    """A finished study: extracted, trained, evaluated."""

    experiment: Experiment
    plan: Plan
    workspace: Workspace
