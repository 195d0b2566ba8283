"""The table of evaluations: what is computed for every SAE, into which file, and how the report shows it."""

from dataclasses import dataclass
from enum import StrEnum

from pipeline.study.stage_code import StageCode


class Need(StrEnum):
    """Data that only some studies have. Every study has held-out rows and latents, so these need no entry."""

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
    """Its file inside its artefact."""
    apart: int | None = None
    """Format number of an evaluation that has an artefact of its own, so that it can be added to a finished study. None: it
    is a part of the SAE's evaluation, and an SAE that was evaluated without it stays so."""
    siblings: bool = False
    """Whether it reads the SAEs of the arm's other seeds. An arm with one seed leaves it out."""
    needs: frozenset[Need] = frozenset()
    """A study without one of these leaves the evaluation out."""
    compute: StageCode
    """Takes an SAE's `Bench` (pipeline/evaluate/bench.py), returns the content of the file: JSON without NaN."""
    show: StageCode
    """Takes the content of the file, returns fields of a row of the results (pipeline/report/rows.py)."""


EVALUATIONS: dict[str, Evaluation] = {
    name: Evaluation(
        name=name,
        file=f"{name}.json",
        apart=apart,
        siblings=name == "stability",
        needs=frozenset(needs),
        compute=f"pipeline.evaluate.{module}:compute",
        show=f"pipeline.report.rows:{name}",
    )
    for name, module, needs, apart in (
        ("reconstruction", "reconstruction", (), None),
        ("ground_truth", "recovery", (Need.truth,), None),
        ("capture", "capture", (), None),
        ("interference", "interference", (), None),
        ("loss", "loss", (), None),  # without a model, these two write a file that says why it is empty
        ("examples", "examples", (), None),
        ("sparse_probing", "sparse_probing", (Need.probes,), None),
        ("geometry", "geometry", (), 1),
        ("stability", "stability", (), 1),
    )
}
"""By name, in the order in which they are computed."""
