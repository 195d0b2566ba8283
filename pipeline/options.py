"""The options that several commands of `dasae` share."""

from typing import Annotated

import typer

from pipeline.front import WORKSPACE_VARIABLE

ExperimentArgument = Annotated[
    str, typer.Argument(metavar="EXPERIMENT", help="A name in experiments/, or the path of a TOML file.")
]
WorkspaceOption = Annotated[
    str, typer.Option("--workspace", envvar=WORKSPACE_VARIABLE, help="Folder or s3:// URL that holds all artefacts.")
]
ArmsOption = Annotated[str | None, typer.Option("--arms", help="Only these arms of the study, separated by commas.")]
SeedsOption = Annotated[str | None, typer.Option("--seeds", help="Only these seeds, separated by commas.")]
LayerOption = Annotated[int | None, typer.Option("--layer", help="Only this layer.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Estimate disk and time; make nothing.")]
DeepOption = Annotated[bool, typer.Option("--deep", help="Compare every checksum, not only sizes.")]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Discard what this stage made for the chosen part; make it again.")
]
