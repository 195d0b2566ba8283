"""Runs tasks: one after the other in the flow's own process, or in parallel on Dask's workers."""

import logging
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from prefect.client.schemas.objects import State
from prefect.tasks import Task

from pipeline.errors import BadInputError
from pipeline.runtime.interrupt import stop_when
from pipeline.study.sections import RunConfig

SECONDS_BETWEEN_LOOKS = 1.0
HOST = "127.0.0.1"
"""Where the workers that a flow starts listen."""


class Engine(Protocol):
    """Where tasks run."""

    workers: int
    """Number of tasks that run at the same time, when the flow begins."""
    shared: bool
    """Whether workers come and go, so that work is cut into more tasks than there are workers."""

    def run(self, task: Task[..., Any], calls: Sequence[dict[str, Any]]) -> list[State[Any]]:
        """Call a task with each of several sets of parameters and wait for all. An error is in the state of its call."""
        ...


class Local:
    """The flow's own process. Its main thread receives SIGTERM, so a stage can save its state and stop."""

    workers, shared = 1, False

    def run(self, task: Task[..., Any], calls: Sequence[dict[str, Any]]) -> list[State[Any]]:
        """One call after the other."""
        return [task(**parameters, return_state=True) for parameters in calls]


class Dask:
    """Dask's workers. They must see the same workspace, experiments and texts as the flow."""

    shared = True

    def __init__(self, runner: Any):
        self.runner = runner
        self.stop = f"stop-{runner.client.id}"
        self.workers = max(1, len(runner.client.scheduler_info(n_workers=-1)["workers"]))

    def run(self, task: Task[..., Any], calls: Sequence[dict[str, Any]]) -> list[State[Any]]:
        """As many calls at a time as there are workers. If a worker is lost, another one repeats its call."""
        futures = [self.runner.submit(task, parameters | {"stop": self.stop}) for parameters in calls]
        for future in futures:
            future.wait()
        return [future.state for future in futures]


@contextmanager
def engine(config: RunConfig) -> Generator[Engine]:
    """The engine of an experiment's section [run].

    Raises BadInputError where prefect-dask is not installed, and where workers that the flow starts would share a GPU.
    """
    if config.engine == "local":
        yield Local()
        return
    try:
        from distributed import Event, Scheduler, SpecCluster
        from prefect_dask.task_runners import DaskTaskRunner
    except ImportError:
        raise BadInputError(
            "run.engine is dask, which is not installed: pip install 'direction-aware-sae[dask]', or set it to local"
        ) from None
    started: dict[str, Any] = {"address": config.address}
    if not config.address:
        from pipeline.runtime.devices import cards_for  # here, because torch is slow to import

        workers = workers_here(config.workers, cards_for(config.workers, config.device))
        scheduler = {"cls": Scheduler, "options": {"host": HOST, "port": 0, "dashboard": False}}
        started = {"cluster_class": SpecCluster, "cluster_kwargs": {"scheduler": scheduler, "workers": workers}}
    with DaskTaskRunner(**started) as runner:
        dask = Dask(runner)
        try:
            yield dask
        except BaseException:
            # A task that a worker has begun cannot be cancelled, only asked to stop.
            Event(dask.stop, client=runner.client).set()
            raise


def workers_here(workers: int, cards: Sequence[str]) -> dict[int, dict[str, Any]]:
    """So many workers of this machine, as a cluster of Dask's takes them: each with its share of the memory, and its GPU.

    What CUDA shows a process is in its environment, as dask-cuda has it.
    """
    from distributed import Nanny
    from distributed.system import MEMORY_LIMIT

    from pipeline.runtime.memory import VARIABLE

    share = MEMORY_LIMIT // workers
    # One thread for each worker: a stage uses several cores by itself.
    options = {"host": HOST, "nthreads": 1, "memory_limit": share, "dashboard": False, "silence_logs": logging.WARNING}
    environments = [{VARIABLE: str(share)} | ({"CUDA_VISIBLE_DEVICES": cards[n]} if cards else {}) for n in range(workers)]
    return {n: {"cls": Nanny, "options": options | {"env": env}} for n, env in enumerate(environments)}


@contextmanager
def stop_on_request(name: str | None) -> Generator[None]:
    """On a Dask worker, stop when the flow sets the event `name`: SIGTERM reaches only the flow. None: not on a worker."""
    if name is None:
        yield
        return
    import distributed

    requested, finished = threading.Event(), threading.Event()
    remote = distributed.Event(name, client=distributed.get_client())

    def look() -> None:
        while not finished.wait(SECONDS_BETWEEN_LOOKS):
            if remote.is_set():
                requested.set()
                return

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        with stop_when(requested):
            yield
    finally:
        finished.set()
        watcher.join()
