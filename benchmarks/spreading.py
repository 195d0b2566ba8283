"""How well a study's work spreads: the same study on 1, 2, 4 and 8 worker processes, with a model that sleeps.

    python benchmarks/spreading.py [--workers 1 2 4 8] [--shards 192] [--saes 24]

Every batch, step and encoding sleeps for a while in place of arithmetic, so that two cores can stand for eight devices.
Everything else is the product's: claims, commits, locks, tasks, publishing. Extraction is also measured without Dask, by
processes that claim shards from each other. What processes take to start and to import is not counted.

Efficiency is the time of one worker over N times the time of N.
"""

import argparse
import contextlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

PAUSE = "DASAE_BENCHMARK_PAUSE"
"""Environment variable with the seconds that a batch takes."""
STEP, ENCODING = 0.1, 0.5
"""What a training step and an encoding take, in batches of extraction."""
IMPORTED = ("extract.extraction", "train.training", "evaluate.evaluation", "evaluate.capture", "evaluate.recovery")
STAGES = ("extract", "train", "evaluate")
STUDY = """
description = "Nothing to learn: what is measured is how its work spreads."
[model]
source = "synthetic"
d_in = 16
features = 16
parents = 2
children = 1
correlated_pairs = 2
[corpus]
source = "synthetic"
[store]
layers = [0]
tokens = {rows}
shard_rows = 256
chunk_rows = 64
[train]
d_sae = 16
steps = 200
batch_size = 16
lr_warmup = 20
l1_warmup = 20
heldout_shards = 1
resets = {{ every = 50, first = 100 }}
[study]
layers = [0]
seeds = {seeds}
arms = ["baseline"]
[evaluate]
k_values = [1]
{run}
"""


def pretend() -> None:
    """Make whatever would be arithmetic on a device sleep, in this process."""
    from pipeline.models.synthetic import Truth
    from pipeline.runtime.compatibility import importing_sae_bench
    from pipeline.sae.sae import SAE
    from pipeline.train.step import Trainer

    with importing_sae_bench():
        for name in ("sae_lens.synthetic", *(f"pipeline.{name}" for name in IMPORTED)):
            import_module(name)  # none of it is to be counted
    pause = float(os.environ[PAUSE])
    draw = Truth.draw

    def drawn(self: Truth, layout: Any, shard: int) -> Iterator[Any]:
        for batch in draw(self, layout, shard):
            time.sleep(pause)
            yield batch

    def slowly(function: Callable[..., Any], pause: float) -> Callable[..., Any]:
        @wraps(function)
        def slow(*given: Any, **named: Any) -> Any:
            time.sleep(pause)
            return function(*given, **named)

        return slow

    Truth.draw = drawn
    Trainer.step = slowly(Trainer.step, STEP * pause)
    SAE.encode = slowly(SAE.encode, ENCODING * pause)
    # A device takes the steps of a cohort one after the other, and so does one core.
    os.cpu_count = lambda: 1


def dask_setup(_: object) -> None:
    """Called by `dask worker --preload` with this file."""
    for name in ("orchestration.study", "prefect_dask"):
        import_module(name)
    pretend()


def alone(toml: str, workspace: str, barrier: Any, seconds: Any) -> None:
    """One process of several that fill a store together without Dask."""
    pretend()
    from pipeline.artefacts.workspace import Workspace
    from pipeline.extract.extraction import Extraction
    from pipeline.front import plan_of

    extraction = Extraction(plan_of(toml), Workspace(Path(workspace)))
    work = extraction.prepare()
    barrier.wait()
    began = time.perf_counter()
    extraction.write(work)
    seconds.put(time.perf_counter() - began)


def by_claims(toml: Path, workspace: Path, workers: int) -> float:
    """Seconds that so many processes take to fill the store, each claiming one shard after the other."""
    from pipeline.artefacts.workspace import Workspace
    from pipeline.extract.extraction import Extraction
    from pipeline.front import plan_of

    Extraction(plan_of(str(toml)), Workspace(workspace)).make_model()
    context = multiprocessing.get_context("spawn")
    barrier, seconds = context.Barrier(workers), context.Queue()
    processes = [context.Process(target=alone, args=(str(toml), str(workspace), barrier, seconds)) for _ in range(workers)]
    for process in processes:
        process.start()
    longest = max(seconds.get() for _ in processes)
    for process in processes:
        process.join()
    return longest


@contextlib.contextmanager
def cluster(folder: Path, workers: int) -> Generator[str]:
    """A scheduler and so many workers that have imported everything; yields the scheduler's address."""
    from distributed import Client

    at = folder / "scheduler.json"
    quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    dask, options = [sys.executable, "-m", "dask"], ["--scheduler-file", str(at), "--no-dashboard"]
    processes = [subprocess.Popen([*dask, "scheduler", "--host", "127.0.0.1", "--port", "0", *options], **quiet)]
    try:
        for number in range(workers):
            own = ["--nthreads", "1", "--no-nanny", "--local-directory", str(folder / f"worker-{number}")]
            processes.append(subprocess.Popen([*dask, "worker", *options, *own, "--preload", __file__], **quiet))
        while not at.is_file():
            time.sleep(0.2)
        with Client(scheduler_file=str(at)) as client:
            client.wait_for_workers(workers)
            address = str(client.scheduler_info()["address"])
        yield address
    finally:
        for process in processes:
            process.kill()
            process.wait()


def by_flow(toml: Path, workspace: Path) -> dict[str, float]:
    """Seconds of each stage of the study, run as the flow runs it."""
    from prefect import flow

    import flows
    from orchestration.engine import engine
    from orchestration.study import Study
    from pipeline.artefacts.workspace import Workspace
    from pipeline.front import plan_of

    for name in IMPORTED:
        import_module(f"pipeline.{name}")
    seconds: dict[str, float] = {}
    plan, place = plan_of(str(toml)), Workspace(workspace)

    @flow
    def staged() -> None:
        with engine(plan.experiment.run) as running:
            study = Study(plan=plan, workspace=place, engine=running)
            for stage in STAGES:
                began = time.perf_counter()
                getattr(study, stage)()
                seconds[stage] = time.perf_counter() - began
            assert not study.failed

    with flows._server(place):  # pyright: ignore[reportPrivateUsage]
        staged()
    return seconds


def main() -> None:
    """Measure all, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--shards", type=int, default=192)
    parser.add_argument("--saes", type=int, default=24)
    parser.add_argument("--pause", type=float, default=1.0, help="seconds that a batch takes")
    args = parser.parse_args()
    from measure import show

    found: dict[str, dict[int, float]] = {}
    for workers in args.workers:
        with tempfile.TemporaryDirectory() as temporary:
            folder, toml = Path(temporary), Path(temporary) / "spreading.toml"

            def study(run: str, toml: Path = toml) -> Path:
                rows, seeds = args.shards * 256, list(range(args.saes))
                toml.write_text(STUDY.format(rows=rows, seeds=seeds, run=run))
                return toml

            os.environ[PAUSE] = str(args.pause / 4)  # processes that only claim shards cost less
            found.setdefault("extract, by claims", {})[workers] = by_claims(study(""), folder / "claims", workers)
            os.environ[PAUSE] = str(args.pause)
            with cluster(folder, workers) as address:
                run = f'[run]\nengine = "dask"\naddress = "{address}"'
                for stage, took in by_flow(study(run), folder / "flow").items():
                    found.setdefault(f"{stage}, by the flow", {})[workers] = took
        print({name: round(took[workers], 1) for name, took in found.items()}, flush=True)
    first = args.workers[0]
    rows = [
        [
            name,
            *(f"{took[n]:.1f}" for n in args.workers),
            *(f"{took[first] * first / (took[n] * n):.0%}" for n in args.workers),
        ]
        for name, took in found.items()
    ]
    columns = ["", *(f"{n}, s" for n in args.workers), *(f"{n}, efficiency" for n in args.workers)]
    show(f"{args.shards} shards, {args.saes} SAEs, {args.pause} s a batch", columns, rows)


if __name__ == "__main__":
    main()
