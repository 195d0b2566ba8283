"""The `dasae` command: the stages, together or alone, and what is there already.

Heavy imports stand inside the commands, so that `dasae --help` answers at once.
"""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from pipeline.errors import BadInputError, PipelineError
from pipeline.train.track import Service

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.artefacts.manifest import Artefact
    from pipeline.artefacts.storage import Storage
    from pipeline.study.plan import Plan

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Extract activations once, train every ablation arm of the contrastive SAE from them, compare the arms.",
)
store_app = typer.Typer(no_args_is_help=True, help="Describe or verify an activation store.")
app.add_typer(store_app, name="store")
console = Console()

ExperimentArgument = Annotated[
    str, typer.Argument(metavar="EXPERIMENT", help="A name in experiments/, or the path of a TOML file.")
]
WorkspaceOption = Annotated[
    str, typer.Option("--workspace", envvar="DASAE_WORKSPACE", help="Folder or s3:// URL where all artefacts live.")
]
ArmsOption = Annotated[str | None, typer.Option("--arms", help="Only these arms of the study, separated by commas.")]
SeedsOption = Annotated[str | None, typer.Option("--seeds", help="Only these seeds, separated by commas.")]
LayerOption = Annotated[int | None, typer.Option("--layer", help="Only this layer.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what it would take in disk and time; make nothing.")]
DeepOption = Annotated[bool, typer.Option("--deep", help="Compare every checksum, not only sizes.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Make again what this stage has made for what is chosen.")]
StoreArgument = Annotated[str, typer.Argument(metavar="PATH", help="Folder or s3:// URL of a store.")]
WORKSPACE = "workspace"
PROGRAM = "dasae"
INTERRUPTED = 130
UsageError: Any = typer.BadParameter.__base__
"""What Typer raises for a command line that it cannot understand; it exports only this subclass."""


class Format(StrEnum):
    """What `dasae export --to` knows."""

    saelens = "saelens"


@app.callback()
def global_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options that stand before the command. `main` reads --debug from the command line itself."""


@app.command()
def ablate(
    experiment: ExperimentArgument,
    workspace: WorkspaceOption = WORKSPACE,
    arms: ArmsOption = None,
    seeds: SeedsOption = None,
    layer: LayerOption = None,
) -> None:
    """Extract, train, evaluate and report; only what is missing."""
    plan = _plan(experiment, arms, seeds, layer)
    _extract(plan, workspace)
    failed = _train(plan, workspace)
    failed |= _evaluate(plan, workspace)
    # The report is of the whole study, whatever part of it was run now.
    _report(_plan(experiment), workspace)
    raise typer.Exit(int(failed))


@app.command()
def extract(
    experiment: ExperimentArgument,
    workspace: WorkspaceOption = WORKSPACE,
    dry_run: DryRunOption = False,
    deep: DeepOption = False,
    force: ForceOption = False,
) -> None:
    """Fill the activation store and the probe stores, and repair them where files are missing or damaged."""
    plan = _plan(experiment)
    if dry_run:
        from pipeline.extract.estimate import describe

        console.print(describe(plan), highlight=False, soft_wrap=True)
    else:
        _discard(plan.extracted, workspace, force)
        _extract(plan, workspace, deep)


@app.command()
def train(
    experiment: ExperimentArgument,
    workspace: WorkspaceOption = WORKSPACE,
    arms: ArmsOption = None,
    seeds: SeedsOption = None,
    layer: LayerOption = None,
    track: Annotated[Service | None, typer.Option("--track", help="Show the SAEs' logs live in this, if installed.")] = None,
    force: ForceOption = False,
) -> None:
    """Train the SAEs that are missing, in lockstep from the store. Exit status 1 when one failed."""
    plan = _plan(experiment, arms, seeds, layer)
    _discard(plan.trained, workspace, force)
    raise typer.Exit(int(_train(plan, workspace, track)))


@app.command()
def evaluate(
    experiment: ExperimentArgument,
    workspace: WorkspaceOption = WORKSPACE,
    arms: ArmsOption = None,
    seeds: SeedsOption = None,
    layer: LayerOption = None,
    force: ForceOption = False,
) -> None:
    """Evaluate the SAEs that are trained. Exit status 1 when one is degenerate or could not be measured."""
    plan = _plan(experiment, arms, seeds, layer)
    _discard(plan.evaluated, workspace, force)
    raise typer.Exit(int(_evaluate(plan, workspace)))


@app.command()
def report(
    experiment: ExperimentArgument,
    other: Annotated[str | None, typer.Argument(metavar="[OTHER]", help="A second experiment, to stand beside it.")] = None,
    workspace: WorkspaceOption = WORKSPACE,
) -> None:
    """Write the comparison of the arms, or of two experiments: a page, and the same as JSON and CSV."""
    plan, beside = _plan(experiment), _plan(other) if other else None
    if beside is None:
        _report(plan, workspace)
    elif beside.experiment.name == plan.experiment.name:
        raise BadInputError(f"{experiment} and {other} are one experiment, or two files of one name: name another one")
    else:
        _report_both(plan, beside, workspace)


@app.command()
def status(experiment: ExperimentArgument, workspace: WorkspaceOption = WORKSPACE) -> None:
    """Show what is done, partial or missing, and the next command."""
    from pipeline.artefacts.workspace import Workspace
    from pipeline.study.status import Status

    found = Status(_plan(experiment), Workspace(workspace))
    console.print(found.table())
    console.print(found.next_command(), highlight=False, soft_wrap=True)


@store_app.command()
def info(store: StoreArgument) -> None:
    """Show what was extracted from what, how much, and the norms of each layer."""
    from pipeline.store.describe import store_info
    from pipeline.store.reader import ActivationStore

    for table in store_info(ActivationStore(_store(store), partial=True)):
        console.print(table)


@store_app.command()
def verify(store: StoreArgument, deep: DeepOption = False) -> None:
    """Check that every committed file is there in its size. Exit status 1 when one is not."""
    from pipeline.store.verify import damages

    found = damages(_store(store), deep=deep)
    for damage in found:
        console.print(f"[bold]damaged[/]: {damage}", highlight=False, soft_wrap=True)
    how = "every checksum compared" if deep else "sizes compared; --deep compares every checksum"
    console.print(f"{len(found)} files damaged ({how})" if found else f"no damage ({how})", highlight=False)
    raise typer.Exit(int(bool(found)))


@app.command()
def export(
    sae: Annotated[str, typer.Argument(metavar="SAE", help="A finished SAE: its folder, or its name in the workspace.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder.")],
    to: Annotated[Format, typer.Option("--to", help="Library that is to load it.")] = Format.saelens,
    workspace: WorkspaceOption = WORKSPACE,
) -> None:
    """Copy a finished SAE, verified, into a folder that another library loads."""
    from pipeline.artefacts.workspace import Workspace
    from pipeline.sae.finished import export_sae, find

    found = find(sae, Workspace(workspace))
    export_sae(found, folder)
    console.print(f"export: {found.name} to {folder}, for {to.value}", highlight=False, soft_wrap=True)


def _plan(experiment: str, arms: str | None = None, seeds: str | None = None, layer: int | None = None) -> "Plan":
    from pipeline.study.experiment import Experiment
    from pipeline.study.plan import make_plan

    try:
        numbers = [int(seed) for seed in seeds.split(",")] if seeds is not None else None
    except ValueError:
        raise BadInputError(f"--seeds {seeds!r}: give whole numbers separated by commas, such as 0,1") from None
    return make_plan(
        Experiment.load(experiment),
        arms=[arm.strip() for arm in arms.split(",")] if arms is not None else None,
        seeds=numbers,
        layers=None if layer is None else [layer],
    )


def _store(place: str) -> "Storage":
    from pipeline.artefacts.storage import open_storage
    from pipeline.store import format as fmt

    storage = open_storage(place)
    # A store that lost one of the two is a damaged one.
    if not fmt.is_laid_out(storage) and not storage.sizes(fmt.COMMITS):
        raise BadInputError(f"{place} is no activation store; those of a workspace are in its folders stores/ and probes/")
    return storage


def _discard(artefacts: "Sequence[Artefact]", workspace: str, force: bool) -> None:
    from pipeline.artefacts.workspace import Workspace

    opened = Workspace(workspace)
    for artefact in artefacts if force else ():
        opened.discard(artefact)


def _extract(plan: "Plan", workspace: str, deep: bool = False) -> None:
    from pipeline.artefacts.workspace import Workspace
    from pipeline.extract.extraction import extract

    made = extract(plan, Workspace(workspace), deep=deep)
    console.print(f"extract: {len(made)} made, {len(plan.extracted) - len(made)} were there", highlight=False)


def _train(plan: "Plan", workspace: str, track: Service | None = None) -> bool:
    from pipeline.artefacts.workspace import Workspace
    from pipeline.train.training import train

    result = train(plan, Workspace(workspace), track)
    there = len(plan.saes) - len(result.made) - len(result.failed)
    console.print(f"train: {len(result.made)} SAEs trained, {there} were there", highlight=False)
    for sae, why in result.failed.items():
        console.print(f"[bold]failed[/]: {sae}: {why}; not published", highlight=False)
    return bool(result.failed)


def _evaluate(plan: "Plan", workspace: str) -> bool:
    from pipeline.artefacts.workspace import Workspace
    from pipeline.evaluate.evaluation import evaluate

    result = evaluate(plan, Workspace(workspace))
    there = len(plan.saes) - len(result.made) - len(result.untrained) - len(result.failed)
    console.print(f"evaluate: {len(result.made)} SAEs evaluated, {there} were there", highlight=False)
    for sae in result.untrained:
        console.print(f"[bold]not trained[/]: {sae}", highlight=False)
    for sae, why in result.degenerate.items():
        console.print(f"[bold]degenerate[/]: {sae}: {why}", highlight=False)
    for sae, why in result.failed.items():
        console.print(f"[bold]failed[/]: {sae}: {why}", highlight=False)
    return bool(result.degenerate or result.failed)


def _report(plan: "Plan", workspace: str) -> None:
    from pipeline.artefacts.workspace import Workspace
    from pipeline.report.collect import collect
    from pipeline.report.page import write_report
    from pipeline.report.terminal import results_table

    opened = Workspace(workspace)
    results = collect(plan, opened)
    page = write_report(results, opened.report(plan.experiment.name))
    console.print(results_table(results))
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


def _report_both(plan: "Plan", other: "Plan", workspace: str) -> None:
    from pipeline.artefacts.workspace import Workspace
    from pipeline.report.collect import collect
    from pipeline.report.versus import write_comparison

    opened = Workspace(workspace)
    place = opened.report(f"{plan.experiment.name}-beside-{other.experiment.name}")
    page = write_comparison(collect(plan, opened), collect(other, opened), place)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line. Whatever goes wrong ends it with one line: exit code 2 for bad input, 1 for failure."""
    try:
        code = app(prog_name=PROGRAM, standalone_mode=False)
    except PipelineError as error:
        if "--debug" in sys.argv:
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except UsageError as error:
        message = " ".join(error.format_message().split()).replace("Value error, ", "")
        if message:  # none where the command is missing: then Typer has shown the help
            command = error.ctx.command_path if error.ctx else PROGRAM
            print(f"error: {message[0].lower()}{message[1:].rstrip('.')}; see {command} --help", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        print("interrupted; run the same command again to go on", file=sys.stderr)
    sys.exit(code or 0)
