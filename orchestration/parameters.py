"""Types the parameters of the flows, so that Prefect shows a form and refuses invalid values before a run exists."""

import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from prefect.runtime import flow_run
from pydantic import Field

from pipeline.errors import PipelineError
from pipeline.front import plan_of
from pipeline.study.arms import ARMS
from pipeline.study.experiment import EXPERIMENTS
from pipeline.study.plan import MOST_NAMED


def known_arms() -> list[str]:
    """The built-in arms, then those that the experiments of the current folder declare."""
    declared: list[str] = []
    for path in sorted(EXPERIMENTS.glob("*.toml")):
        try:
            declared += tomllib.loads(path.read_text(encoding="utf-8")).get("arms", {})
        except (tomllib.TOMLDecodeError, UnicodeDecodeError):
            continue  # running that experiment reports the error
    return list(dict.fromkeys([*ARMS, *declared]))


# Prefect takes titles and descriptions from the flows' own signatures and docstrings.
ExperimentName = Annotated[str, Field(min_length=1)]
# The list is fixed when a flow is deployed. Deploy again to offer an arm that was declared since.
Arm = Annotated[str, Field(json_schema_extra={"enum": [*known_arms()]})]
Seed = Annotated[int, Field(ge=0)]
Layer = Annotated[int, Field(ge=0)]
ALL: list[Any] = []
"""The empty list means all. Prefect's form shows an empty list at once, but None only behind a switch."""


def run_name() -> str:
    """Name of the current flow run: its flow, experiment, arms, seeds and layer, and the key of the activation store."""
    return name_of(str(flow_run.flow_name), flow_run.parameters)


def name_of(flow: str, parameters: dict[str, Any]) -> str:
    """Name of a run of `flow` with these parameters."""
    chosen: list[str] = []
    if arms := parameters.get("arms"):
        chosen.append(", ".join(arms) if len(arms) <= MOST_NAMED else f"{len(arms)} arms")
    if seeds := parameters.get("seeds"):
        chosen.append(f"seeds {', '.join(map(str, seeds))}")
    if (layer := parameters.get("layer")) is not None:
        chosen.append(f"layer {layer}")
    with suppress(PipelineError):  # the run itself reports the error
        chosen.append(plan_of(parameters["experiment"]).store.key)
    return " · ".join([f"{flow} {Path(parameters['experiment']).stem}", *chosen])
