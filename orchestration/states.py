"""Turns what a stage returns or raises into the state that Prefect shows."""

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

from pipeline.artefacts.system_errors import trouble
from pipeline.errors import InterruptedRunError, PipelineError, StorageError
from pipeline.runtime.interrupt import stop_when

P = ParamSpec("P")
R = TypeVar("R")

GRACE_SECONDS = 8.0
"""Time for a stage to save its state after a request to stop. Prefect's worker kills the process after 30 s."""


def errors_in_one_line(function: Callable[P, R]) -> Callable[P, R]:
    """Turn a PipelineError into the state Failed with its message. Prefect logs other exceptions as unexpected."""

    @wraps(function)
    def guarded(*arguments: P.args, **options: P.kwargs) -> Any:
        try:
            return function(*arguments, **options)
        except InterruptedRunError:
            # The stage has saved its state. Prefect knows who asked it to stop: a cancelled run ends as Cancelled, a run
            # whose worker was stopped ends as Crashed. Either can be run again.
            raise TerminationSignal(signal.SIGTERM) from None
        except PipelineError as error:
            return Failed(message=str(error), data=error)

    return guarded


def may_pass(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001 - Prefect's signature
    """True for an I/O error that a retry can overcome."""
    lasting = PipelineError | FileNotFoundError | PermissionError | NotADirectoryError | IsADirectoryError
    error = state.data
    return isinstance(error, StorageError) or (
        isinstance(error, Exception) and not isinstance(error, lasting) and trouble(error) is not None
    )


def stage_task(name: str) -> Callable[[Callable[P, R]], Task[P, R]]:
    """Make a function a task: runs are named by the template `name`, and errors that `may_pass` are retried.

    Delays between retries grow. Results stay in memory: Prefect stores none, so nothing is pickled to disk.
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
    """Run a stage in a thread while the main thread waits for SIGTERM and then asks the stage to stop.

    The main thread must keep Prefect's own handler of SIGTERM; without it Prefect shows every cancelled run as crashed. A
    stage that does not stop within the grace period ends with the process; what it has not published does not exist.
    """
    if threading.current_thread() is not threading.main_thread():  # on a Dask worker, which gets no signal
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
    """What a task returned, or its error. Raises InterruptedRunError for a task that was asked to stop."""
    if state.is_cancelled():
        raise InterruptedRunError(state.message or "stopped on request")
    result = state.result(raise_on_failure=False)
    if isinstance(result, Exception):
        return result
    if state.is_failed() or state.is_crashed():
        return PipelineError(state.message or state.name)
    return result


def reason(error: Exception) -> str:
    """Why a task failed, in one line; with the type of the error unless it was raised on purpose."""
    message = " ".join(str(error).split())
    return message if isinstance(error, PipelineError) else f"{type(error).__name__}: {message}"


def outcome(made: list[str], failed: Mapping[str, str]) -> Any:
    """What a flow returns: the paths it made, or the state Cached when there was nothing to do.

    Raises PipelineError, which lists the failures, when some failed.
    """
    if failed:
        by_reason: dict[str, list[str]] = {}
        for what, why in failed.items():
            by_reason.setdefault(why, []).append(what)
        listed = "; ".join(f"{', '.join(names)}: {why}" for why, names in by_reason.items())
        raise PipelineError(f"{len(failed)} failed: {listed}. Everything else is finished")
    return made or Completed(name="Cached", message="Nothing to do, everything was there.", data=made)


def without_traceback(record: logging.LogRecord) -> bool:
    """A filter for Prefect's log: a PipelineError is logged without its traceback."""
    if record.exc_info and isinstance(record.exc_info[1], PipelineError):
        record.exc_info = None
    return True


for logger in ("prefect.task_runs", "prefect.flow_runs"):
    logging.getLogger(logger).addFilter(without_traceback)
