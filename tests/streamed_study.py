"""Studies small enough to be trained from a store and from a stream: of a small random language model, and synthetic."""

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from grown_study import STUDY

from pipeline.artefacts.workspace import Workspace
from pipeline.errors import PipelineError
from pipeline.extract.extraction import row_maker
from pipeline.sae.formats import WEIGHTS
from pipeline.store.format import ShardRows
from pipeline.store.ring import Maker
from pipeline.study.experiment import Experiment
from pipeline.study.plan import Plan, make_plan
from pipeline.train import cohort
from pipeline.train.training import train

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


def streamed_plan(folder: Path, kind: str, mode: str, old: str = "", new: str = "") -> Plan:
    """The study `language` or `synthetic` in a mode of the store, with something in its file replaced.

    The first needs the model and the text of `Grown.made`.
    """
    more = f'mode = "{mode}"'
    if kind == "language":
        parts = {"model": folder / "model", "corpus": folder / "text.jsonl", "layers": [1, 2], "study_layer": 1}
        toml = LANGUAGE.format(**parts, tokens=TOKENS, more=more)
    else:
        toml = SYNTHETIC.format(more=more)
    path = folder / f"{kind}-{mode}.toml"
    path.write_text(toml.replace(old, new))
    return replace(make_plan(Experiment.load(str(path))), probes={})


def weights(plan: Plan, workspace: Workspace) -> dict[str, bytes]:
    """The weights of every SAE."""
    return {str(sae): (workspace.folder(sae.artefact) / WEIGHTS).read_bytes() for sae in plan.saes}


def noted(made: Path) -> list[int]:
    """The shards that `train_here` made so far."""
    return [int(line) for line in made.read_text().split()] if made.exists() else []


def noting(note: Callable[[int], object]) -> Callable[[Plan, Workspace], Maker]:
    """A maker of rows that first calls `note` with the shard."""

    def opened(plan: Plan, workspace: Workspace) -> Maker:
        make = row_maker(plan, workspace)

        def called(shard: int) -> ShardRows:
            note(shard)
            return make(shard)

        return called

    return opened


def together(plan: Plan, workspace: Workspace) -> None:
    """Wait until two processes read the stream."""
    while len(workspace.ring(plan.store).sizes("readers")) < 2:
        time.sleep(0.01)


def train_here(toml: str, root: str, arm: str | None, made: str, what: str, number: int = 0) -> None:
    """Train in this process with a checkpoint every step, and note each shard that is made in the file `made`.

    With the shard that is made as `number`, `what` happens: the process waits for a second one ("together"), hangs, or gets
    a signal. The exit code is that of the command line.
    """
    plan, workspace = make_plan(Experiment.load(toml), arms=[arm] if arm else None), Workspace(root)
    cohort.SAVING_SHARE = float("inf")

    def note(shard: int) -> None:
        with Path(made).open("a") as file:
            file.write(f"{shard}\n")
        if len(noted(Path(made))) != number:
            return
        if what == "together":
            together(plan, workspace)
        if what == "hang":
            time.sleep(600)
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "term":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(2)

    try:
        train(plan, workspace, row_maker=noting(note), save_every=0)
    except PipelineError as error:
        sys.exit(error.exit_code)
