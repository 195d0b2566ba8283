"""The parameters of the flows, typed so that Prefect's pages show a form and refuse what cannot be before a run exists."""

import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from prefect.runtime import flow_run
from pydantic import Field

from pipeline.errors import PipelineError
from pipeline.study.arms import ARMS
from pipeline.study.experiment import EXPERIMENTS, Experiment
from pipeline.study.plan import MOST_NAMED, make_plan


def known_arms() -> list[str]:
    """The built-in arms, then those that the experiments of the current folder declare."""
    declared: list[str] = []
    for path in sorted(EXPERIMENTS.glob("*.toml")):
        try:
            declared += tomllib.loads(path.read_text(encoding="utf-8")).get("arms", {})
        except (tomllib.TOMLDecodeError, UnicodeDecodeError):
            continue  # whoever runs that experiment is told
    return list(dict.fromkeys([*ARMS, *declared]))


# Prefect takes titles and descriptions from the flows' own signatures and docstrings.
ExperimentName = Annotated[str, Field(min_length=1)]
# The names are of the moment of deployment: deploy again after declaring an arm that is to be chosen here.
Arm = Annotated[str, Field(json_schema_extra={"enum": [*known_arms()]})]
Seed = Annotated[int, Field(ge=0)]
Layer = Annotated[int, Field(ge=0)]
ALL: list[Any] = []
"""Nothing chosen. An empty list is a plain field of Prefect's forms, where None would first have to be switched off."""


def run_name() -> str:
    """Name of a flow run: its flow, experiment, arms and seeds, and the key of the activation store that it is about."""
    return name_of(str(flow_run.flow_name), flow_run.parameters)


def name_of(flow: str, parameters: dict[str, Any]) -> str:
    """The same from a flow's name and parameters."""
    chosen: list[str] = []
    if arms := parameters.get("arms"):
        chosen.append(", ".join(arms) if len(arms) <= MOST_NAMED else f"{len(arms)} arms")
    if seeds := parameters.get("seeds"):
        chosen.append(f"seeds {', '.join(map(str, seeds))}")
    if (layer := parameters.get("layer")) is not None:
        chosen.append(f"layer {layer}")
    with suppress(PipelineError):  # the run itself says what is wrong
        chosen.append(make_plan(Experiment.load(parameters["experiment"])).store.key)
    return " · ".join([f"{flow} {Path(parameters['experiment']).stem}", *chosen])
