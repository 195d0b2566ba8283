"""Training from a stream against training from a store that keeps all, on the demonstration's model; one pass in each run.

    python benchmarks/streaming.py [--rounds 3] [--saes 1 11]

The same SAEs see the same rows in the same order. A store has made its rows before, and that is not counted here; a stream
makes them while it trains.
"""

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from measure import interleaved, show

from pipeline.artefacts.workspace import Workspace
from pipeline.extract.extraction import extract, row_maker
from pipeline.store.reader import ActivationStore
from pipeline.study.experiment import Experiment
from pipeline.study.plan import Plan, make_plan
from pipeline.train.training import train

DEMO = Path(__file__).parents[1] / "experiments" / "demo.toml"
SHARD, SHARDS, WINDOW, BATCH = 8192, 26, 4, 512
ROWS = (SHARDS - 1) * SHARD


def study(folder: Path, mode: str, saes: int) -> tuple[Plan, Workspace]:
    """The demonstration, reduced, in a mode of the store, and a workspace."""
    demo = Experiment.load(str(DEMO))
    changes = {
        "model": {"steps": 20},  # what the model has learned does not matter here
        "store": {"tokens": SHARDS * SHARD, "shard_rows": SHARD, "mode": mode},
        "train": {"steps": ROWS // BATCH, "batch_size": BATCH, "window_shards": WINDOW},
        "study": {"arms": ("no-contrast",), "seeds": tuple(range(saes))},
    }
    sections = {name: getattr(demo, name).model_copy(update=update) for name, update in changes.items()}
    return replace(make_plan(demo.model_copy(update=sections)), probes={}), Workspace(folder / mode)


def trained(plan: Plan, workspace: Workspace) -> None:
    """Train all SAEs of a plan anew."""
    for sae in plan.saes:
        workspace.discard(sae.artefact)
    assert not train(plan, workspace, row_maker=row_maker).failed


def made(plan: Plan, workspace: Workspace) -> None:
    """Make the rows of a stream, and drop them."""
    make, store = row_maker(plan, workspace), ActivationStore(workspace.storage(plan.store))
    for shard in set(store.every_shard) - set(store.shards):
        make(shard)


def main() -> None:
    """Train from both in turn, and make the rows of the stream without training."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--saes", type=int, nargs="+", default=[1, 11])
    args = parser.parse_args()
    rows: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        for saes in args.saes:
            keep, stream = (study(Path(folder), mode, saes) for mode in ("keep", "stream"))
            extract(*keep)
            extract(*stream)
            contestants = {
                "a store": partial(trained, *keep),
                "a stream": partial(trained, *stream),
                "making the rows alone": partial(made, *stream),
            }
            took = interleaved(contestants, args.rounds)
            for name, timing in took.items():
                numbers = [timing.seconds, timing.cpu_seconds, timing.seconds / took["a store"].seconds]
                rows.append([f"{saes} SAEs, {name}", *(f"{number:.2f}" for number in numbers)])
    show(f"one pass over {ROWS:,} rows", ["", "seconds", "CPU seconds", "over a store"], rows)


if __name__ == "__main__":
    main()
