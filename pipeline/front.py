"""Shared by the commands `dasae`, `flows.py` and `experiment.py`: opens the workspace, makes the plan, shows errors.

Heavy imports stand inside the functions, so that `dasae --help` answers at once.
"""

import os
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from pipeline.artefacts.system_errors import trouble
from pipeline.errors import PipelineError

if TYPE_CHECKING:
    from pipeline.artefacts.workspace import Workspace
    from pipeline.study.plan import Plan

WORKSPACE_VARIABLE = "DASAE_WORKSPACE"
REPORTS_VARIABLE = "DASAE_REPORTS"
"""Names the address at which `dasae serve` shows the reports."""
DEFAULT_WORKSPACE = "workspace"
INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells have it."""


def run(command: Callable[[], int], *, debug: bool = False) -> int:
    """Run a command and return its exit code. An error becomes one line on stderr; with `debug` it keeps its traceback."""
    try:
        return command()
    except PipelineError as error:
        if debug:
            raise
        complain(str(error))
        return error.exit_code
    except Exception as error:
        reason = None if debug else trouble(error)
        if reason is None:
            raise
        complain(f"{reason}; solve that, then run the same command again")
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED


def complain(message: str) -> None:
    """Print an error, in one line."""
    print(f"error: {message}", file=sys.stderr)


def open_workspace(place: str | None = None, *, only_read: bool = False) -> "Workspace":
    """The workspace at a folder or `s3://` URL; by default the one that DASAE_WORKSPACE names, or else `workspace`."""
    from pipeline.artefacts.workspace import Workspace

    place = os.environ.get(WORKSPACE_VARIABLE, DEFAULT_WORKSPACE) if place is None else place
    return Workspace(place, only_read=only_read)


def plan_of(
    experiment: str, arms: Iterable[str] | None = None, seeds: Iterable[int] | None = None, layer: int | None = None
) -> "Plan":
    """The plan of an experiment, given by name or path, or of the chosen part of it.

    Raises BadInputError when the experiment is invalid, or has no such arm, seed or layer.
    """
    from pipeline.study.experiment import Experiment
    from pipeline.study.plan import make_plan

    return make_plan(Experiment.load(experiment), arms=arms, seeds=seeds, layers=None if layer is None else [layer])
