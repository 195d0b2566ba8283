"""The commands `dasae workspace check` and `clean`."""

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.filesize import decimal

from pipeline.errors import BadInputError
from pipeline.front import DEFAULT_WORKSPACE, open_workspace, plan_of
from pipeline.options import WorkspaceOption

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.artefacts.workspace import Workspace
    from pipeline.study.litter import Litter
    from pipeline.study.plan import Plan

workspace_app = typer.Typer(no_args_is_help=True, help="Find and remove what belongs to nobody.")
console = Console(markup=False)
ExperimentsOption = Annotated[
    list[str] | None,
    typer.Option("--experiment", help="Another experiment that is known, beside those in experiments/; may be repeated."),
]


@workspace_app.command()
def check(experiments: ExperimentsOption = None, workspace: WorkspaceOption = DEFAULT_WORKSPACE) -> None:
    """List what belongs to nobody: leftovers of killed processes, broken links, and artefacts of no known experiment."""
    _litter(experiments or [], open_workspace(workspace))


@workspace_app.command()
def clean(
    experiments: ExperimentsOption = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    orphans: Annotated[bool, typer.Option("--orphans", help="Also remove artefacts of no known experiment.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove leftovers and broken links, after showing them."""
    from pipeline.study.litter import What, remove

    opened = open_workspace(workspace)
    chosen = [one for one in _litter(experiments or [], opened) if orphans or one.what != What.orphan]
    if not chosen:
        console.print("nothing to remove" + ("" if orphans else "; --orphans removes orphans, too"), highlight=False)
    elif yes or typer.confirm(f"remove {len(chosen)} of these?"):
        removed = list(remove(opened, chosen))
        console.print(f"{len(removed)} removed, {len(chosen) - len(removed)} in use", highlight=False)


def _litter(experiments: "Sequence[str]", workspace: "Workspace") -> "list[Litter]":
    """What belongs to nobody, after showing it. The experiments in experiments/ are known, and those given."""
    from pipeline.study.experiment import available
    from pipeline.study.litter import litter

    plans: list[Plan] = []
    for name in dict.fromkeys([*available(), *experiments]):
        try:
            plans.append(plan_of(name))
        except BadInputError as error:
            if name in experiments:
                raise
            console.print(f"{name} is not known here, so its artefacts count as orphans: {error}", highlight=False)
    found = litter(workspace, plans)
    for one in found:
        console.print(f"{one.what:12} {decimal(one.bytes):>10}  {one.path}", highlight=False, soft_wrap=True)
    total = decimal(sum(one.bytes for one in found))
    console.print(f"{len(found)} in {workspace.root} belong to nobody, {total}", highlight=False, soft_wrap=True)
    return found
