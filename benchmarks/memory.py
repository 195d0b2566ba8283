"""How much memory extraction and training take: against the tokens of a store, and against the SAEs of a cohort.

    python benchmarks/memory.py [--tokens 65536 524288] [--saes 1 16 32]

A synthetic study with rows of 256 entries and TopK SAEs of 2,048 latents. Each stage runs in a process of its own; what is
counted is its largest resident size beyond what it had when everything was imported.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from measure import peak_memory, reset_peak_memory, show

D_IN, D_SAE = 256, 2048
STUDY = """
description = "What is measured is memory."
[model]
source = "synthetic"
d_in = 256
features = 256
[corpus]
source = "synthetic"
[store]
layers = [0]
tokens = {tokens}
shard_rows = 8192
[train]
activation = "topk"
k = 32
d_sae = 2048
steps = 20
batch_size = 1024
lr_warmup = 5
l1_warmup = 5
buffer_chunks = 16
heldout_shards = 1
resets = {{ every = 5, first = 5 }}
[study]
layers = [0]
seeds = {seeds}
arms = ["baseline"]
[evaluate]
k_values = [1]
"""


def one(stage: str, toml: str, workspace: str) -> None:
    """Run a stage, and print the bytes that it took."""
    from pipeline.artefacts.workspace import Workspace
    from pipeline.front import plan_of
    from pipeline.runtime.compatibility import importing_sae_bench

    with importing_sae_bench():
        import_module("sae_lens.synthetic")
    names = {"extract": "extract.extraction", "train": "train.training"}
    run = getattr(import_module(f"pipeline.{names[stage]}"), stage)
    plan, place = plan_of(toml), Workspace(Path(workspace))
    if stage == "extract":
        from pipeline.extract.extraction import Extraction

        Extraction(plan, place).make_model()
    reset_peak_memory()
    before = peak_memory()
    run(plan, place)
    print(json.dumps(peak_memory() - before))


def stages(folder: Path, tokens: int, saes: int) -> list[float]:
    """MB that extracting and training take, one after the other."""
    toml, taken = folder / "memory.toml", []
    toml.write_text(STUDY.format(tokens=tokens, seeds=list(range(saes))))
    for stage in ("extract", "train"):
        command = [sys.executable, __file__, "--one", stage, str(toml), str(folder / "workspace")]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        taken.append(json.loads(done.stdout.splitlines()[-1]) / 1e6)
    return taken


def main() -> None:
    """Measure all, and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[65_536, 524_288])
    parser.add_argument("--saes", type=int, nargs="+", default=[1, 16, 32])
    parser.add_argument("--one", nargs=3, metavar=("STAGE", "TOML", "WORKSPACE"))
    args = parser.parse_args()
    if args.one:
        one(*args.one)
        return
    rows: list[list[str]] = []
    # Weights and two Adam moments, float32: what `pipeline.train.cohort_size` counts for each SAE.
    counted = 3 * 2 * 4 * D_IN * D_SAE / 1e6
    for tokens, saes in [(tokens, 4) for tokens in args.tokens] + [(args.tokens[0], saes) for saes in args.saes]:
        with tempfile.TemporaryDirectory() as temporary:
            taken = stages(Path(temporary), tokens, saes)
        stored = f"{2 * D_IN * tokens / 1e6:.0f}"
        rows.append(
            [f"{tokens:,}", stored, str(saes), f"{saes * counted:.0f}", *(f"{megabytes:.0f}" for megabytes in taken)]
        )
        print(rows[-1], flush=True)
    columns = ["tokens", "SAEs", "MB of rows", "MB of weights and moments", "extract, MB", "train, MB"]
    show(f"peak memory beyond what was imported, d_in {D_IN}, d_sae {D_SAE}", columns, rows)


if __name__ == "__main__":
    main()
