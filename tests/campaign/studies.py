"""Two studies small enough for thousands of runs, and their workspaces as undisturbed runs leave them after every stage."""

import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from campaign.judge import files
from campaign.workers import command, run

STAGES = ("extract", "train", "evaluate", "report")
SYNTHETIC = """
description = "Known features, the smallest study that has every kind of file but texts."
[model]
source = "synthetic"
d_in = 16
features = 32
parents = 4
children = 2
correlated_pairs = 4
seed = {seed}
[corpus]
source = "synthetic"
[store]
layers = [0]
tokens = 5_000
context = 128
shard_rows = 1024
chunk_rows = 256
[train]
d_sae = 40
steps = 50
batch_size = 64
learning_rate = 2e-2
lr_warmup = 10
l1 = 0.2
l1_warmup = 10
buffer_chunks = 4
[train.resets]
every = 10
first = 10
[arms.full-l0]
from = "no-contrast"
question = "Is it the L0?"
match_l0 = "full"
[study]
layers = [0]
seeds = [0]
arms = ["baseline", "full", "full-l0"]
[evaluate]
k_values = [1, 5]
"""
TEXTS = """
description = "A language model of two layers: activations, labelled texts, loss recovered."
[model]
source = "tiny"
steps = 4
batch_size = 4
vocabulary = 512
d_in = 32
depth = 2
seed = {seed}
[corpus]
source = "python"
[store]
layers = [1]
tokens = 3_000
context = 32
shard_rows = 1024
chunk_rows = 256
[probes]
datasets = ["python/text-kind"]
train_size = 20
test_size = 10
context = 32
[train]
d_sae = 40
steps = 50
batch_size = 64
lr_warmup = 10
l1_warmup = 10
learning_rate = 1e-2
l1 = 0.05
buffer_chunks = 2
[train.resets]
every = 20
[study]
layers = [1]
seeds = [0]
arms = ["baseline", "full"]
[evaluate]
k_values = [1, 5]
loss_tokens = 512
"""


@dataclass(frozen=True)
class Study:
    """An experiment file, and the workspaces of an undisturbed run."""

    toml: Path

    def after(self, stage: str) -> Path:
        """The workspace after this stage; "nothing" is the empty one. Read only."""
        return self.toml.parent / f"after-{stage}"

    def before(self, stage: str) -> Path:
        """The workspace in which this stage is next."""
        return self.after(("nothing", *STAGES)[STAGES.index(stage)])

    def argv(self, stage: str, workspace: Path | str, *options: str) -> tuple[str, ...]:
        """The command line of a stage."""
        return (stage, str(self.toml), "--workspace", str(workspace), *options)

    def reference(self, stage: str) -> dict[str, bytes]:
        """The files of the workspace after this stage."""
        return _read(self.after(stage))


_read = cache(files)


def made(home: Path, name: str, seed: int = 0) -> Study:
    """The study of this name with its workspaces, which are made unless they are there."""
    text = {"synthetic": SYNTHETIC, "texts": TEXTS}[name].format(seed=seed)
    folder = home / (f"{name}-{seed}" if seed else name)
    study = Study(folder / f"{name}.toml")
    if (folder / "complete").exists():
        return study
    shutil.rmtree(folder, ignore_errors=True)
    study.after("nothing").mkdir(parents=True)
    study.toml.write_text(text)
    for stage in STAGES:
        shutil.copytree(study.before(stage), study.after(stage))
        ended = run(command(*study.argv(stage, study.after(stage))), folder)
        assert ended.code == 0, f"{stage} without any fault: {ended.output}"
        shutil.rmtree(study.after(stage) / ".locks", ignore_errors=True)
    (folder / "complete").touch()
    return study
