"""From what a stage returns or raises to the state that Prefect shows."""

import logging
import signal
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextvars import copy_context
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.exceptions import TerminationSignal
from prefect.states import Cancelled, Completed, Failed
from prefect.tasks import Task, exponential_backoff

from pipeline.errors import InterruptedRunError, PipelineError, StorageError
from pipeline.runtime.interrupt import stop_when

P = ParamSpec("P")
R = TypeVar("R")

GRACE_SECONDS = 8.0
"""For a stage to commit what it has in hand. Prefect's worker kills after thirty."""


def errors_in_one_line(function: Callable[P, R]) -> Callable[P, R]:
    """Make a PipelineError the state of the flow run: Prefect calls an exception that leaves a flow unexpected."""

    @wraps(function)
    def guarded(*arguments: P.args, **options: P.kwargs) -> Any:
        try:
            return function(*arguments, **options)
        except InterruptedRunError:
            # The stage has saved what it could: now it is Prefect's turn, which knows who asked. A run that was cancelled
            # ends Cancelled, one whose worker was told to stop ends Crashed, and either can be run again.
            raise TerminationSignal(signal.SIGTERM) from None
        except PipelineError as error:
            return Failed(message=str(error), data=error)

    return guarded


def may_pass(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001 - Prefect's signature
    """Whether what a task failed of is trouble with reading or writing, which trying again can overcome."""
    lasting = PipelineError | FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError
    return isinstance(state.data, StorageError) or (isinstance(state.data, OSError) and not isinstance(state.data, lasting))


def stage_task(name: str) -> Callable[[Callable[P, R]], Task[P, R]]:
    """A task whose run is called `name`, a template of its parameters; tried again, later and later, after `may_pass` only.

    Results are paths and reasons, handed over in memory: nothing is stored by Prefect, so nothing is pickled to disk.
    """

    def decorate(function: Callable[P, R]) -> Task[P, R]:
        @wraps(function)
        def stoppable(*arguments: P.args, **options: P.kwargs) -> Any:
            try:
                return _interruptibly(partial(function, *arguments, **options))
            except (InterruptedRunError, TerminationSignal) as error:
                return Cancelled(message=str(error) or "stopped on request")

        return task(
            task_run_name=name,
            persist_result=False,
            cache_policy=NO_CACHE,
            retries=3,
            retry_delay_seconds=exponential_backoff(backoff_factor=10),
            retry_jitter_factor=0.5,
            retry_condition_fn=may_pass,
        )(stoppable)

    return decorate


def _interruptibly(work: Callable[[], R]) -> R:
    """Do work in a thread of its own while the main thread waits for a signal, upon which the work is asked to stop.

    A stage would otherwise take SIGTERM itself. Prefect tells a cancelled run from one whose worker was stopped by whether
    its own handler is in place, and would show every cancelled run as crashed. Work that does not stop within the grace
    period is left behind and dies with the process: whatever it had not published does not exist.
    """
    if threading.current_thread() is not threading.main_thread():  # on a Dask worker, where there is no signal to wait for
        return work()
    stop, done = threading.Event(), Future[R]()

    def run() -> None:
        try:
            with stop_when(stop):
                done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=copy_context().run, args=(run,), daemon=True)
    thread.start()
    try:
        return done.result()
    except BaseException:
        stop.set()
        thread.join(GRACE_SECONDS)
        raise


def value_or_error(state: State[R]) -> R | Exception:
    """What a finished task returned, or why it did not. Raises InterruptedRunError for one that was asked to stop."""
    if state.is_cancelled():
        raise InterruptedRunError(state.message or "stopped on request")
    result = state.result(raise_on_failure=False)
    if isinstance(result, Exception):
        return result
    if state.is_failed() or state.is_crashed():
        return PipelineError(state.message or state.name)
    return result


def reason(error: Exception) -> str:
    """One line that says why a task failed: only what nobody foresaw names its kind."""
    said = " ".join(str(error).split())
    return said if isinstance(error, PipelineError) else f"{type(error).__name__}: {said}"


def outcome(made: list[str], failed: Mapping[str, str]) -> Any:
    """What a flow returns: the paths it made. Cached when there was nothing to do, Failed with a list when some failed.

    Prefect gives the caller of the flow the list of paths unless it failed.
    """
    if failed:
        by_reason: dict[str, list[str]] = {}
        for what, why in failed.items():
            by_reason.setdefault(why, []).append(what)
        listed = "; ".join(f"{', '.join(names)}: {why}" for why, names in by_reason.items())
        raise PipelineError(f"{len(failed)} failed: {listed}. Everything else is finished")
    return made or Completed(name="Cached", message="Nothing to do, everything was there.", data=made)


def without_traceback(record: logging.LogRecord) -> bool:
    """A filter for Prefect's log: the message of a PipelineError says it all."""
    if record.exc_info and isinstance(record.exc_info[1], PipelineError):
        record.exc_info = None
    return True


for logger in ("prefect.task_runs", "prefect.flow_runs"):
    logging.getLogger(logger).addFilter(without_traceback)
