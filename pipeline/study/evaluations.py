"""The evaluations that every SAE of a study goes through: one entry each, read by the stage that computes and by the report.

An entry names functions of stages as "module:function", because the study is a floor below them and a plan must not wait for
torch. A function itself does as well.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pkgutil import resolve_name
from typing import Any

Function = str | Callable[..., Any]
"""A function, or where it is: "module:function"."""


class Need(StrEnum):
    """What an evaluation can ask for."""

    heldout = "heldout"
    """Held-out rows and their latents, in one pass that all evaluations of an SAE share."""
    pairs = "pairs"
    """Statistics of pairs of latents on held-out rows."""
    probes = "probes"
    """Labelled texts; left out in a study without any."""
    model = "model"
    """The whole language model; left out where the model is synthetic."""
    text = "text"
    """The tokens behind held-out rows."""
    baseline = "baseline"
    """The SAE of the arm `baseline` with the same seed and layer."""
    truth = "truth"
    """The features of a synthetic model; left out where there is none."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation of an SAE."""

    name: str
    """Its key in a row of the results."""
    file: str
    """Its file inside the artefact."""
    needs: frozenset[Need]
    compute: Function
    """From the bench of a layer and an SAE on it to what the file holds (`evaluate/evaluation.py`)."""
    show: Function
    """From what the file holds to what stands in a row of the results (`report/collect.py`)."""


EVALUATIONS: dict[str, Evaluation] = {}
"""By name, in the order in which they are computed."""


def function(reference: Function) -> Callable[..., Any]:
    """The function that an entry names."""
    return resolve_name(reference) if isinstance(reference, str) else reference
