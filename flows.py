"""The stages as Prefect flows: `extract`, `train`, `evaluate`, and `ablation`, which is all three and the report.

The work, and the knowledge of what is still to be done, is in `pipeline`. A flow returns the workspace paths of what it
made, and ends as Cached when everything was there. `python flows.py demo` runs a whole study without a server.
"""

import argparse
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

# Prefect reads both when it is imported; either alone leaves some telemetry on.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_HOME,
    PREFECT_SERVER_EPHEMERAL_ENABLED,
    PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS,
    PREFECT_SERVER_LOGGING_LEVEL,
    temporary_settings,
)
from prefect.states import Completed, Failed

from pipeline.errors import PipelineError
from pipeline.experiment import load
from pipeline.plan import Plan, make_plan
from pipeline.workspace import Workspace

P = ParamSpec("P")
R = TypeVar("R")


def errors_in_one_line(function: Callable[P, R]) -> Callable[P, R]:
    """Make a PipelineError the state of the flow run: Prefect calls an exception that leaves a flow unexpected."""

    @wraps(function)
    def guarded(*arguments: P.args, **options: P.kwargs) -> Any:
        try:
            return function(*arguments, **options)
        except PipelineError as error:
            return Failed(message=str(error), data=error)

    return guarded


@flow(flow_run_name="extract {experiment}", persist_result=False)
@errors_in_one_line
def extract(experiment: str, workspace: str | None = None) -> list[str]:
    """Fill the activation store and the probe stores of an experiment.

    Args:
        experiment: A name in experiments/, or the path of a TOML file.
        workspace: Folder of the artefacts; by default the one that DASAE_WORKSPACE names, else `workspace`.
    """
    return _outcome(extract_stores(make_plan(load(experiment)), _workspace(workspace)))


@flow(flow_run_name="train {experiment}", persist_result=False)
@errors_in_one_line
def train(
    experiment: str,
    workspace: str | None = None,
    arms: list[str] | None = None,
    seeds: list[int] | None = None,
    layer: int | None = None,
) -> list[str]:
    """Train the sparse autoencoders of an experiment that do not exist yet.

    Args:
        experiment: A name in experiments/, or the path of a TOML file.
        workspace: Folder of the artefacts; by default the one that DASAE_WORKSPACE names, else `workspace`.
        arms: Only these arms of the study.
        seeds: Only these seeds.
        layer: Only this layer.
    """
    made, failed = _train(_part(experiment, arms, seeds, layer), _workspace(workspace))
    _fail_if_any(failed)
    return _outcome(made)


@flow(flow_run_name="evaluate {experiment}", persist_result=False)
@errors_in_one_line
def evaluate(
    experiment: str,
    workspace: str | None = None,
    arms: list[str] | None = None,
    seeds: list[int] | None = None,
    layer: int | None = None,
) -> list[str]:
    """Measure the sparse autoencoders of an experiment that were not measured yet.

    Args:
        experiment: A name in experiments/, or the path of a TOML file.
        workspace: Folder of the artefacts; by default the one that DASAE_WORKSPACE names, else `workspace`.
        arms: Only these arms of the study.
        seeds: Only these seeds.
        layer: Only this layer.
    """
    from pipeline.report.collect import collect

    plan, place = _part(experiment, arms, seeds, layer), _workspace(workspace)
    made = _evaluate(plan, place)
    _show_table(collect(plan, place))
    return _outcome(made)


@flow(flow_run_name="ablation {experiment}", persist_result=False)
@errors_in_one_line
def ablation(experiment: str, workspace: str | None = None) -> list[str]:
    """Extract, train, evaluate and report: whatever of the whole study is missing.

    Args:
        experiment: A name in experiments/, or the path of a TOML file.
        workspace: Folder of the artefacts; by default the one that DASAE_WORKSPACE names, else `workspace`.
    """
    plan, place = make_plan(load(experiment)), _workspace(workspace)
    extracted = extract_stores(plan, place)
    trained, failed = _train(plan, place)
    sound = replace(plan, saes=tuple(sae for sae in plan.saes if str(sae) not in failed))
    evaluated = _evaluate(sound, place)
    if sound.saes:
        write_page(plan, place)
    _fail_if_any(failed)
    return _outcome([*extracted, *trained, *evaluated])


@task(task_run_name="extract {plan.experiment.name}", persist_result=False, cache_policy=NO_CACHE)
def extract_stores(plan: Plan, workspace: Workspace) -> list[str]:
    """Run the extraction stage; returns the paths of the artefacts made."""
    from pipeline.extract import stage

    return [artefact.path for artefact in stage.extract(plan, workspace)]


@task(task_run_name="train layer {plan.saes[0].layer}", persist_result=False, cache_policy=NO_CACHE)
def train_cohort(plan: Plan, workspace: Workspace) -> tuple[list[str], dict[str, str]]:
    """Run the training stage on SAEs that share their batches; returns the paths made, and who failed and why."""
    from pipeline.train import stage

    trained = stage.train(plan, workspace)
    return [sae.artefact.path for sae in trained.made], trained.failed


@task(task_run_name="evaluate layer {plan.saes[0].layer}", persist_result=False, cache_policy=NO_CACHE)
def evaluate_layer(plan: Plan, workspace: Workspace) -> list[str]:
    """Run the evaluation stage on SAEs of one layer; returns the paths of the evaluations made."""
    from pipeline.evaluate import stage

    evaluated = stage.evaluate(plan, workspace)
    for sae, reason in evaluated.degenerate.items():
        get_run_logger().warning("%s is degenerate: %s", sae, reason)
    return [sae.evaluation.path for sae in evaluated.made]


@task(task_run_name="report {plan.experiment.name}", persist_result=False, cache_policy=NO_CACHE)
def write_page(plan: Plan, workspace: Workspace) -> str:
    """Write the report of what is evaluated; returns the path of its page."""
    from pipeline.report.collect import collect
    from pipeline.report.page import write_report

    results = collect(plan, workspace)
    page = write_report(results, workspace.report(plan.experiment.name))
    _show_table(results)
    create_markdown_artifact(f"`{page}`", key=_artifact_key(results, "report"), description="Where the report lies.")
    return page


def _train(plan: Plan, workspace: Workspace) -> tuple[list[str], dict[str, str]]:
    from pipeline.train.stage import cohorts

    made: list[str] = []
    failed: dict[str, str] = {}
    for cohort in cohorts(plan, workspace):
        paths, lost = train_cohort(replace(plan, saes=tuple(cohort)), workspace)
        made += paths
        failed |= lost
    return made, failed


def _evaluate(plan: Plan, workspace: Workspace) -> list[str]:
    made: list[str] = []
    for layer in dict.fromkeys(sae.layer for sae in plan.saes):
        made += evaluate_layer(replace(plan, saes=tuple(sae for sae in plan.saes if sae.layer == layer)), workspace)
    return made


def _part(experiment: str, arms: list[str] | None, seeds: list[int] | None, layer: int | None) -> Plan:
    return make_plan(load(experiment), arms=arms, seeds=seeds, layers=None if layer is None else [layer])


def _workspace(folder: str | None) -> Workspace:
    return Workspace(folder or os.environ.get("DASAE_WORKSPACE", "workspace"))


def _outcome(made: list[str]) -> Any:
    """What the flow returns. Prefect gives its caller the list in either case."""
    return made or Completed(name="Cached", message="Nothing to do, everything was there.", data=made)


def _fail_if_any(failed: dict[str, str]) -> None:
    if failed:
        saes = "; ".join(f"{sae}: {why}" for sae, why in failed.items())
        raise PipelineError(f"not trained: {saes}. The other SAEs are finished")


def _show_table(results: dict[str, Any]) -> None:
    """Put the arms' results on the page of the flow run."""
    ks = [str(k) for k in results["k_values"]]
    table = [
        {
            "arm": row["arm"],
            "seed": row["seed"],
            "layer": row["layer"],
            "FVU": row["fvu"],
            "L0": row["l0"],
            "dead": row["dead_fraction"],
            **{f"probing k={k}": (row["sparse_probing"] or {}).get(k) for k in ks},
            "pair capture": (row["bpcr"] or {}).get("union"),
            "degenerate": row["degenerate"],
        }
        for row in results["rows"]
    ]
    create_table_artifact(table, key=_artifact_key(results, "results"), description=results["description"])


def _artifact_key(results: dict[str, Any], what: str) -> str:
    """Prefect takes lower-case letters, digits and dashes."""
    return f"{re.sub('[^a-z0-9]+', '-', results['experiment'])}-{what}"


def _without_traceback(record: logging.LogRecord) -> bool:
    """The message of a PipelineError says it all."""
    if record.exc_info and isinstance(record.exc_info[1], PipelineError):
        record.exc_info = None
    return True


logging.getLogger("prefect.task_runs").addFilter(_without_traceback)


def main(arguments: list[str] | None = None) -> int:
    """Run the `ablation` flow here and now, and print its results; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python flows.py", description="Extract, train, evaluate, report: a whole study.")
    parser.add_argument("experiment", help="a name in experiments/, or the path of a TOML file")
    parser.add_argument("--workspace", help="folder of the artefacts (default: $DASAE_WORKSPACE, else workspace)")
    options = parser.parse_args(arguments)
    try:
        place = _workspace(options.workspace)
        study = load(options.experiment)  # before the seconds that a server takes to start
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
