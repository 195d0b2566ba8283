"""Runs the real command line in forks of a process that has imported everything: a case costs no imports.

The parent computes nothing, so that it has no threads, and a fork of it cannot wait for a lock that nobody will release.
"""

import itertools
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures.thread import _python_exit
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

LIMIT = 60.0
"""Seconds after which a command counts as hanging."""
OUTPUT = ".campaign-"
"""How the names of the files begin that hold the output of a child."""
_numbers = itertools.count()


@dataclass(frozen=True)
class Ended:
    """How a process ended; `code` is None when it had to be killed after the limit, and negative after a signal."""

    code: int | None
    output: str

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.output

    @property
    def last_line(self) -> str:
        lines = self.output.strip().splitlines() or [""]
        return next((line for line in reversed(lines) if line.startswith("error:")), lines[-1])[:400]


@dataclass(frozen=True)
class Child:
    """A running fork."""

    pid: int
    output: Path

    def signal(self, number: int) -> None:
        """Send a signal. A child that has ended is not reaped before `wait`, so the number is still its own."""
        os.kill(self.pid, number)

    def wait(self, limit: float = LIMIT) -> Ended:
        """Wait for its end, at most `limit` seconds."""
        deadline, pause, code = time.monotonic() + limit, 0.002, None
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                break
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                break
            time.sleep(pause)
            pause = min(pause * 1.3, 0.05)
        said = self.output.read_text(errors="replace")
        self.output.unlink()
        return Ended(code, said)


def start(function: Callable[[], object], folder: Path) -> Child:
    """Run a function in a fork; its output goes to a file in `folder`."""
    output = folder / f"{OUTPUT}{os.getpid()}-{next(_numbers)}"
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _be_a_process(function, descriptor)
    os.close(descriptor)
    return Child(pid, output)


def run(function: Callable[[], object], folder: Path, limit: float = LIMIT) -> Ended:
    """Run a function in a fork and wait for it."""
    return start(function, folder).wait(limit)


def command(*argv: object, before: Callable[[], object] = lambda: None) -> Callable[[], None]:
    """The command line with these arguments, for `start`; `before` is called in the child, ahead of it."""

    def call() -> None:
        from pipeline.cli import main
        from pipeline.train import cohort

        cohort.time = _SteppingClock()
        before()
        sys.argv = ["dasae", *map(str, argv)]
        main()

    return call


def import_everything() -> None:
    """Import what the commands import late. Call it once, before the first fork."""
    # One core for each case: several run side by side.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", COLUMNS="200", MPLBACKEND="agg", DO_NOT_TRACK="1")
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", PREFECT_SERVER_ANALYTICS_ENABLED="false")
    for module in (
        "pipeline.cli", "pipeline.extract.extraction", "pipeline.train.training", "pipeline.evaluate.evaluation",
        "pipeline.evaluate.recovery", "pipeline.report.collect", "pipeline.report.page", "pipeline.report.terminal",
        "pipeline.study.status", "pipeline.store.describe", "pipeline.store.verify", "pipeline.sae.finished",
        "transformers.models.gemma2.modeling_gemma2", "safetensors.torch", "scipy.stats", "sklearn.linear_model", "pandas",
    ):  # fmt: skip
        import_module(module)
    from pipeline.runtime.compatibility import importing_sae_bench
    from pipeline.texts import python

    with importing_sae_bench():
        import_module("sae_lens.synthetic")
    python.fingerprint()
    list(python.corpus_texts())


class _SteppingClock:
    """`time` as the training loop sees it: every look is ten seconds later, so that all runs save at the same steps."""

    def __init__(self) -> None:
        self.looks = 0

    def monotonic(self) -> float:
        self.looks += 1
        return 10.0 * self.looks

    def __getattr__(self, name: str) -> object:
        return getattr(time, name)


def _be_a_process(function: Callable[[], object], output: int) -> None:
    """Never returns: what an interpreter does from its start to its end."""
    code = 70
    try:
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        function()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:  # as an interpreter: whatever nobody caught is a traceback
        traceback.print_exc()
        code = 1
    finally:
        try:
            _python_exit()  # an interpreter waits for the threads of its pools
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
