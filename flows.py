"""The Prefect flows: extract, train, evaluate, and ablation, which is all three and the report.

Each makes only what is missing: a run that finds everything done ends as Cached. `orchestration/` has the tasks, `pipeline/`
the stages. `python flows.py demo` runs a whole study at once and needs no running server. Prefect builds its forms from a
flow's own signature and docstring; that is why `train` and `evaluate` repeat theirs.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Generator
from contextlib import contextmanager

from orchestration.alive import alive
from orchestration.artifacts import show_results
from orchestration.engine import engine
from orchestration.parameters import ALL, Arm, ExperimentName, Layer, Seed, run_name
from orchestration.states import errors_in_one_line, outcome
from orchestration.study import Study
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import InterruptedRunError
from pipeline.front import open_workspace, plan_of, run
from pipeline.study.experiment import Experiment

# isort: split
# After orchestration, which switches telemetry off before Prefect is imported.
from prefect import flow
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_HOME,
    PREFECT_SERVER_EPHEMERAL_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    PREFECT_SERVER_LOGGING_LEVEL,
    temporary_settings,
)


@flow(flow_run_name=run_name, persist_result=False)
@errors_in_one_line
def extract(experiment: ExperimentName, workspace: str = "", force: bool = False) -> list[str]:
    """Fill the activation store and the probe stores of an experiment.

    Args:
        experiment: A name in experiments/, or the path of a TOML file.
        workspace: Folder or s3:// URL of the artefacts; if empty, DASAE_WORKSPACE of the machine that runs the flow, or
            else the folder `workspace`.
        force: Discard what this stage has made for the study and make it again. Other stages' artefacts stay.
    """
    with _study(experiment, workspace) as study:
        if force:
            study.discard(study.plan.extracted)
        study.extract()
        study.announce()
        return outcome(study.made, study.failed)


@flow(flow_run_name=run_name, persist_result=False)
@errors_in_one_line
def train(
    experiment: ExperimentName,
    workspace: str = "",
    arms: list[Arm] = ALL,
    seeds: list[Seed] = ALL,
    layer: Layer | None = None,
    force: bool = False,
) -> list[str]:
    """Train the sparse autoencoders of an experiment that do not exist yet.

    Args:
        experiment: A name in experiments/, or the path of a TOML file.
        workspace: Folder or s3:// URL of the artefacts; if empty, DASAE_WORKSPACE of the machine that runs the flow, or
            else the folder `workspace`.
        arms: Only these arms of the study; if empty, all of them.
        seeds: Only these seeds; if empty, all of them.
        layer: Only this layer; by default all of them.
        force: Discard what this stage has made for the chosen part of the study and make it again. Other stages' artefacts
            stay.
    """
    with _study(experiment, workspace, arms, seeds, layer) as study:
        if force:
            study.discard(study.plan.trained)
        study.train()
        return outcome(study.made, study.failed)


@flow(flow_run_name=run_name, persist_result=False)
@errors_in_one_line
def evaluate(
    experiment: ExperimentName,
    workspace: str = "",
    arms: list[Arm] = ALL,
    seeds: list[Seed] = ALL,
    layer: Layer | None = None,
    force: bool = False,
) -> list[str]:
    """Evaluate the sparse autoencoders of an experiment that were not evaluated yet.

    Args:
        experiment: A name in experiments/, or the path of a TOML file.
        workspace: Folder or s3:// URL of the artefacts; if empty, DASAE_WORKSPACE of the machine that runs the flow, or
            else the folder `workspace`.
        arms: Only these arms of the study; if empty, all of them.
        seeds: Only these seeds; if empty, all of them.
        layer: Only this layer; by default all of them.
        force: Discard what this stage has made for the chosen part of the study and make it again. Other stages' artefacts
            stay.
    """
    from pipeline.report.collect import collect

    with _study(experiment, workspace, arms, seeds, layer) as study:
        if force:
            study.discard([*study.plan.evaluated, *study.plan.model_sides.values()])
        study.evaluate()
        if study.made:
            show_results(collect(study.plan, study.workspace))
        return outcome(study.made, study.failed)


@flow(flow_run_name=run_name, persist_result=False)
@errors_in_one_line
def ablation(experiment: ExperimentName, workspace: str = "") -> list[str]:
    """Extract, train, evaluate and report whatever is missing of the whole study.

    Args:
        experiment: A name in experiments/, or the path of a TOML file.
        workspace: Folder or s3:// URL of the artefacts; if empty, DASAE_WORKSPACE of the machine that runs the flow, or
            else the folder `workspace`.
    """
    with _study(experiment, workspace) as study:
        study.extract()
        study.train()
        if not study.nothing_trained:
            study.evaluate()
            study.report()
        return outcome(study.made, study.failed)


@contextmanager
def _study(
    experiment: str, workspace: str, arms: list[str] = ALL, seeds: list[int] = ALL, layer: int | None = None
) -> Generator[Study]:
    plan = plan_of(experiment, arms or None, seeds or None, layer)
    with alive(), engine(plan.experiment.run) as running:
        yield Study(plan=plan, workspace=_anywhere(open_workspace(workspace or None)), engine=running)


def _anywhere(workspace: Workspace) -> Workspace:
    """The same workspace with an absolute path, because tasks and automations may run in another folder."""
    return workspace if workspace.remote else Workspace(workspace.local.resolve())


def main(arguments: list[str] | None = None) -> int:
    """Run the `ablation` flow here and now, and print its results; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python flows.py", description="Extract, train, evaluate, report: a whole study.")
    parser.add_argument("experiment", help="a name in experiments/, or the path of a TOML file")
    parser.add_argument("--workspace", default="", help="place of artefacts (default: $DASAE_WORKSPACE, else workspace)")
    options = parser.parse_args(arguments)
    return run(lambda: _run_ablation(options.experiment, options.workspace))


def _run_ablation(experiment: str, workspace: str) -> int:
    place = open_workspace(workspace or None)
    study = Experiment.load(experiment)  # errors show before the seconds that a server takes to start
    with _server(place):
        made = ablation(experiment, workspace)
    from rich.console import Console

    from pipeline.report.results import Results
    from pipeline.report.terminal import results_table

    report = place.report(study.name)
    Console(markup=False).print(results_table(Results.model_validate_json(report.read("results.json"))))
    print(f"{len(made)} artefacts made" if made else "nothing to do, everything was there")
    print(f"report: {report}/index.html")
    return 0


@contextmanager
def _server(workspace: Workspace) -> Generator[None]:
    """The server of PREFECT_API_URL; without that variable a temporary server, whose database is in the workspace."""
    if PREFECT_API_URL.value():
        yield
        return
    terminated = False

    def stop(*_: object) -> None:
        nonlocal terminated
        terminated = True
        raise KeyboardInterrupt  # otherwise the server outlives this process

    signal.signal(signal.SIGTERM, stop)
    home = workspace.local.resolve() / ".prefect"
    home.mkdir(parents=True, exist_ok=True)
    # The stages show their progress and errors are raised; Prefect's log would repeat both.
    logging.getLogger("prefect").setLevel(logging.CRITICAL)
    with temporary_settings(
        set_defaults={
            PREFECT_HOME: home,
            PREFECT_SERVER_EPHEMERAL_ENABLED: True,
            PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 60,  # a busy machine needs more than the default 20
            # It stops together with the flow and would complain of events that it had no time to store.
            PREFECT_SERVER_LOGGING_LEVEL: "CRITICAL",
            PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,  # nothing watches it, and its thread delays the end by a second
        }
    ):
        from prefect.server.api.server import SubprocessASGIServer  # here, because most runs have a server

        try:
            # Named by its address, or each of Dask's workers would start a server of its own.
            with SubprocessASGIServer() as server, temporary_settings({PREFECT_API_URL: server.api_url}):
                yield
        except KeyboardInterrupt:
            if terminated:
                raise InterruptedRunError("stopped on request; run the same command again to go on") from None
            raise


if __name__ == "__main__":
    sys.exit(main())
