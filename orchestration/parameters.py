"""The parameters of the flows, typed so that Prefect's pages show a form and refuse what cannot be before a run exists."""

import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from prefect.runtime import flow_run
from pydantic import Field

from pipeline.arms import ARMS
from pipeline.errors import PipelineError
from pipeline.experiment import EXPERIMENTS, load
from pipeline.plan import make_plan


def known_arms() -> list[str]:
    """The built-in arms, then those that the experiments beside this file declare."""
    declared: list[str] = []
    for path in sorted(EXPERIMENTS.glob("*.toml")):
        try:
            declared += tomllib.loads(path.read_text(encoding="utf-8")).get("arms", {})
        except (tomllib.TOMLDecodeError, UnicodeDecodeError):
            continue  # whoever runs that experiment is told
    return list(dict.fromkeys([*ARMS, *declared]))


ExperimentName = Annotated[
    str, Field(min_length=1, title="Experiment", description="A name in experiments/, or the path of a TOML file.")
]
WorkspacePlace = Annotated[
    str | None,
    Field(
        title="Workspace",
        description="Folder or s3:// URL of the artefacts; by default what DASAE_WORKSPACE says where the flow runs, else "
        "the folder `workspace`.",
    ),
]
# The names are of the moment of deployment: deploy again after declaring an arm that is to be chosen here.
Arm = Annotated[str, Field(json_schema_extra={"enum": [*known_arms()]})]
Arms = Annotated[list[Arm] | None, Field(title="Arms", description="Only these arms of the study; by default all of them.")]
Seed = Annotated[int, Field(ge=0)]
Seeds = Annotated[list[Seed] | None, Field(title="Seeds", description="Only these seeds; by default all of them.")]
Layer = Annotated[int | None, Field(ge=0, title="Layer", description="Only this layer; by default all of them.")]
Force = Annotated[
    bool,
    Field(
        title="Force",
        description="Make again what this stage has made for the chosen part of the study. Other stages' artefacts stay.",
    ),
]


def run_name() -> str:
    """Name of a flow run: its flow, experiment, arms and seeds, and the key of the activation store that it is about."""
    return name_of(str(flow_run.flow_name), flow_run.parameters)


def name_of(flow: str, parameters: dict[str, Any]) -> str:
    """The same from a flow's name and parameters."""
    chosen = [
        ", ".join(map(str, parameters[name])) if isinstance(parameters[name], list) else f"{label}{parameters[name]}"
        for name, label in (("arms", ""), ("layer", "layer "))
        if parameters.get(name) is not None
    ]
    if parameters.get("seeds") is not None:
        chosen.append(f"seeds {', '.join(map(str, parameters['seeds']))}")
    with suppress(PipelineError):  # the run itself says what is wrong
        chosen.append(make_plan(load(parameters["experiment"])).store.key)
    return " · ".join([f"{flow} {Path(parameters['experiment']).stem}", *chosen])
