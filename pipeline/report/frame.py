"""Reads the tables of a report as data frames, for a notebook."""

from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal, cast

from pipeline.artefacts.workspace import Workspace
from pipeline.study.experiment import Experiment
from pipeline.study.reports import read_report

if TYPE_CHECKING:
    import pandas as pd


def read_results(
    experiment: Experiment, workspace: Workspace, table: Literal["results", "differences"] = "results"
) -> "pd.DataFrame":
    """A table of a study's report: `results` has a line per SAE, `differences` one per metric and pair of arms.

    Columns are those of results.csv and differences.csv; accuracies and rates are from 0 to 1, losses in nats per token.
    What was not measured is NaN. Raises MissingArtefactError when there is no report yet, and CorruptArtefactError for a
    table that was changed after it was written.
    """
    import pandas as pd

    remedy = f"make it with: dasae report {experiment.argument}"
    content = read_report(workspace.report(experiment.name), f"{table}.csv", remedy)
    # A key of 12 hexadecimal digits can look like a number. By default pandas may read a number wrong in its last digit.
    exact: Any = {"dtype": {"sae": str}, "float_precision": "round_trip"}
    return cast("pd.DataFrame", pd.read_csv(BytesIO(content), **exact))  # its overloads do not know round_trip
