"""The table of evaluations: what is computed of every SAE, into which file, and how the report shows it.

An entry names functions of the stages as "module:function", because the study lies below the stages and a plan must not wait
for torch. A script that adds an entry may give the functions themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pkgutil import resolve_name
from typing import Any

Function = str | Callable[..., Any]
"""A function, or where it is: "module:function"."""


class Need(StrEnum):
    """What only some studies have. Held-out rows, latents and pairs of latents are in every study and need no mention."""

    probes = "probes"
    """Labelled texts."""
    model = "model"
    """A language model, with its tokenizer and the tokens behind the rows."""
    truth = "truth"
    """The features of a synthetic model."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation of an SAE."""

    name: str
    """Its key in the table."""
    file: str
    """Its file inside the evaluation's artefact."""
    needs: frozenset[Need] = frozenset()
    """A study without one of these leaves the evaluation out."""
    compute: Function
    """Takes an SAE's `Bench` (pipeline/evaluate/bench.py), returns the content of the file: JSON without NaN."""
    show: Function
    """Takes the content of the file, returns the fields that it adds to a row of the results (pipeline/report/rows.py)."""


EVALUATIONS: dict[str, Evaluation] = {
    evaluation.name: evaluation
    for evaluation in (
        Evaluation(
            name="reconstruction",
            file="reconstruction.json",
            compute="pipeline.evaluate.reconstruction:compute",
            show="pipeline.report.rows:reconstruction",
        ),
        Evaluation(
            name="ground_truth",
            file="ground_truth.json",
            needs=frozenset({Need.truth}),
            compute="pipeline.evaluate.recovery:compute",
            show="pipeline.report.rows:ground_truth",
        ),
        Evaluation(
            name="capture",
            file="capture.json",
            compute="pipeline.evaluate.capture:compute",
            show="pipeline.report.rows:capture",
        ),
        Evaluation(
            name="interference",
            file="interference.json",
            compute="pipeline.evaluate.interference:compute",
            show="pipeline.report.rows:interference",
        ),
        # The next two do not need a model: without one their files say why they are empty.
        Evaluation(
            name="loss",
            file="loss.json",
            compute="pipeline.evaluate.loss:compute",
            show="pipeline.report.rows:loss",
        ),
        Evaluation(
            name="examples",
            file="examples.json",
            compute="pipeline.evaluate.examples:compute",
            show="pipeline.report.rows:examples",
        ),
        Evaluation(
            name="sparse_probing",
            file="sparse_probing.json",
            needs=frozenset({Need.probes}),
            compute="pipeline.evaluate.sparse_probing:compute",
            show="pipeline.report.rows:sparse_probing",
        ),
    )
}
"""By name, in the order in which they are computed."""


def function(reference: Function) -> Callable[..., Any]:
    """The function that an entry names, imported now."""
    return resolve_name(reference) if isinstance(reference, str) else reference
