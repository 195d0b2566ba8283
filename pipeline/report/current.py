"""Whether a report still has to be written: asked by every scheduled run, so it imports nothing heavy."""

import json
from typing import Any

import pipeline
from pipeline.artefacts.workspace import Workspace
from pipeline.study.arms import arms_of
from pipeline.study.plan import Plan


def made_of(plan: Plan, workspace: Workspace) -> dict[str, Any]:
    """What a report follows from: the program, the words of the experiment, and which making of every evaluation."""
    evaluations = {sae.evaluation.path: workspace.fingerprint(sae.evaluation.path) for sae in plan.saes}
    known = arms_of(plan.experiment.arms)
    return {
        "version": pipeline.__version__,
        "description": plan.experiment.description,
        "arms": {name: [known[name].question, known[name].base] for name in plan.experiment.study.arms},
        "evaluations": {path: found for path, found in evaluations.items() if found},
    }


def is_current(plan: Plan, workspace: Workspace) -> bool:
    """Whether the report that is there follows from what is there."""
    place = workspace.report(plan.experiment.name)
    try:
        written = json.loads(place.read("results.json"))
    except (FileNotFoundError, ValueError):
        return False
    return written.get("made_of") == made_of(plan, workspace) and place.size("index.html") is not None
