"""Tells whether a report is up to date. Every scheduled run asks, so nothing heavy is imported here."""

import json

import pipeline
from pipeline.artefacts.workspace import Workspace
from pipeline.report.results import MadeOf
from pipeline.study.arms import arms_of
from pipeline.study.plan import Plan


def made_of(plan: Plan, workspace: Workspace) -> MadeOf:
    """All that a report depends on: the program's version, the experiment's texts, and the evaluations as they are now."""
    evaluations = {sae.evaluation.path: workspace.fingerprint(sae.evaluation.path) for sae in plan.saes}
    known = arms_of(plan.experiment.arms)
    return MadeOf(
        version=pipeline.__version__,
        description=plan.experiment.description,
        arms={name: (known[name].question, known[name].base) for name in plan.experiment.study.arms},
        evaluations={path: found for path, found in evaluations.items() if found},
    )


def is_current(plan: Plan, workspace: Workspace) -> bool:
    """True if the report in the workspace shows all that is evaluated."""
    place = workspace.report(plan.experiment.name)
    try:
        written = json.loads(place.read("results.json"))
        return MadeOf.model_validate(written["made_of"]) == made_of(plan, workspace) and place.size("index.html") is not None
    except (FileNotFoundError, ValueError, KeyError):
        return False
