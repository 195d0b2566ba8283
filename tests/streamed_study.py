"""Studies small enough to be trained from a store and from a stream: of a small random language model, and synthetic."""

from pathlib import Path

from grown_study import STUDY

from pipeline.artefacts.workspace import Workspace
from pipeline.sae.formats import WEIGHTS
from pipeline.study.experiment import Experiment
from pipeline.study.plan import Plan, make_plan

SHARD, WINDOW, SHARDS, HELDOUT, BATCH = 256, 2, 11, 2, 64
TRAINED = SHARDS - HELDOUT
TOKENS = SHARD * SHARDS - 100
"""Eleven shards, of which nine are trained on; the last one is short."""
STEPS = 90
"""Two and a half passes."""
LANGUAGE = STUDY.replace("steps = 4", f"steps = {STEPS}\nwindow_shards = {WINDOW}").replace(
    'arms = ["baseline"]', 'arms = ["baseline", "full"]'
)
SYNTHETIC = f"""
description = "A synthetic study, streamed."

[model]
source = "synthetic"
d_in = 16
features = 40
parents = 4
children = 2
correlated_pairs = 5

[corpus]
source = "synthetic"

[store]
layers = [0]
tokens = {TOKENS}
context = 32
shard_rows = {SHARD}
chunk_rows = 64
{{more}}

[train]
d_sae = 32
steps = {STEPS}
batch_size = {BATCH}
heldout_shards = {HELDOUT}
window_shards = {WINDOW}
lr_warmup = 1
l1_warmup = 1
learning_rate = 1e-3

[study]
layers = [0]
arms = ["baseline", "full"]

[evaluate]
k_values = [1]
"""


def streamed_plan(folder: Path, kind: str, mode: str, **changes: str) -> Plan:
    """The study `language` or `synthetic` in a mode of the store, with some words of its file replaced.

    The first needs the model and the text of `Grown.made`.
    """
    more = f'mode = "{mode}"'
    if kind == "language":
        parts = {"model": folder / "model", "corpus": folder / "text.jsonl", "layers": [1, 2], "study_layer": 1}
        toml = LANGUAGE.format(**parts, tokens=TOKENS, more=more)
    else:
        toml = SYNTHETIC.format(more=more)
    for old, new in changes.items():
        toml = toml.replace(old, new)
    path = folder / f"{kind}-{mode}.toml"
    path.write_text(toml)
    return make_plan(Experiment.load(str(path)))


def weights(plan: Plan, workspace: Workspace) -> dict[str, bytes]:
    """The weights of every SAE."""
    return {str(sae): (workspace.folder(sae.artefact) / WEIGHTS).read_bytes() for sae in plan.saes}
