"""The Prefect flows: extract, train, evaluate, and ablation, which is all three and the report.

Each does what is missing and nothing else: a run that finds everything done ends as Cached. What they are made of lies in
`orchestration/`, what the stages do in `pipeline/`. `python flows.py demo` runs a study here and now, without a server.
Prefect makes its forms from a flow's own signature and docstring, which is why `train` and `evaluate` spell theirs out.
"""

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestration.artifacts import show_results
from orchestration.engine import engine
from orchestration.parameters import ALL, Arm, ExperimentName, Layer, Seed, run_name
from orchestration.states import errors_in_one_line, outcome
from orchestration.study import Study
from pipeline.artefacts.storage import SCHEME
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import PipelineError
from pipeline.study.experiment import Experiment
from pipeline.study.plan import make_plan

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
        workspace: Folder or s3:// URL of the artefacts; if empty, what DASAE_WORKSPACE says where the flow runs, else
            the folder `workspace`.
        force: Make again what this stage has made for the study. What other stages have made stays.
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
        workspace: Folder or s3:// URL of the artefacts; if empty, what DASAE_WORKSPACE says where the flow runs, else
            the folder `workspace`.
        arms: Only these arms of the study; if empty, all of them.
        seeds: Only these seeds; if empty, all of them.
        layer: Only this layer; by default all of them.
        force: Make again what this stage has made for the chosen part of the study. What other stages have made stays.
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
    """Measure the sparse autoencoders of an experiment that were not measured yet.

    Args:
        experiment: A name in experiments/, or the path of a TOML file.
        workspace: Folder or s3:// URL of the artefacts; if empty, what DASAE_WORKSPACE says where the flow runs, else
            the folder `workspace`.
        arms: Only these arms of the study; if empty, all of them.
        seeds: Only these seeds; if empty, all of them.
        layer: Only this layer; by default all of them.
        force: Make again what this stage has made for the chosen part of the study. What other stages have made stays.
    """
    from pipeline.report.collect import collect

    with _study(experiment, workspace, arms, seeds, layer) as study:
        if force:
            study.discard(study.plan.evaluated)
        study.evaluate()
        if study.made:
            show_results(collect(study.plan, study.workspace))
        return outcome(study.made, study.failed)


@flow(flow_run_name=run_name, persist_result=False)
@errors_in_one_line
def ablation(experiment: ExperimentName, workspace: str = "") -> list[str]:
    """Extract, train, evaluate and report: whatever of the whole study is missing.

    Args:
        experiment: A name in experiments/, or the path of a TOML file.
        workspace: Folder or s3:// URL of the artefacts; if empty, what DASAE_WORKSPACE says where the flow runs, else
            the folder `workspace`.
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
) -> Iterator[Study]:
    plan = make_plan(
        Experiment.load(experiment), arms=arms or None, seeds=seeds or None, layers=None if layer is None else [layer]
    )
    with engine(plan.experiment.run) as running:
        yield Study(plan=plan, workspace=Workspace(_whole(_place(workspace))), engine=running)


def _place(workspace: str) -> str:
    return workspace or os.environ.get("DASAE_WORKSPACE", "workspace")


def _whole(place: str) -> str:
    """Tasks and automations may run in another folder."""
    return place if place.startswith(SCHEME) else str(Path(place).resolve())


def main(arguments: list[str] | None = None) -> int:
    """Run the `ablation` flow here and now, and print its results; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python flows.py", description="Extract, train, evaluate, report: a whole study.")
    parser.add_argument("experiment", help="a name in experiments/, or the path of a TOML file")
    parser.add_argument("--workspace", default="", help="place of artefacts (default: $DASAE_WORKSPACE, else workspace)")
    options = parser.parse_args(arguments)
    try:
        place = Workspace(_place(options.workspace))
        study = Experiment.load(options.experiment)  # before the seconds that a server takes to start
        with _server(place):
            made = ablation(options.experiment, options.workspace)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is not finished", file=sys.stderr)
        return 130
    from rich.console import Console

    from pipeline.report.terminal import results_table

    report = place.report(study.name)
    Console().print(results_table(json.loads(report.read("results.json"))))
    print(f"{len(made)} artefacts made" if made else "nothing to do, everything was there")
    print(f"report: {report}/index.html")
    return 0


@contextmanager
def _server(workspace: Workspace) -> Iterator[None]:
    """The server of PREFECT_API_URL; without it a temporary one, whose database lies in the workspace."""
    if PREFECT_API_URL.value():
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # else the server would outlive this process
    home = workspace.local.resolve() / ".prefect"
    home.mkdir(parents=True, exist_ok=True)
    # The stages show their progress and errors are raised: the log of the runs would say it all twice.
    logging.getLogger("prefect").setLevel(logging.CRITICAL)
    with temporary_settings(
        set_defaults={
            PREFECT_HOME: home,
            PREFECT_SERVER_EPHEMERAL_ENABLED: True,
            PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS: 60,  # a busy machine needs more than the default 20
            # Stopped together with the flow, it complains of events that it had no time to store, and nobody will read.
            PREFECT_SERVER_LOGGING_LEVEL: "CRITICAL",
            PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,  # nobody watches it, and its thread delays the end by a second
        }
    ):
        yield


if __name__ == "__main__":
    sys.exit(main())
