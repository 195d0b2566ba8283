"""The `dasae` command: runs the stages, together or alone, and shows what is done.

Heavy imports stand inside the commands, so that `dasae --help` answers at once.
"""

import sys
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from pipeline.errors import BadInputError
from pipeline.foresee import foresee
from pipeline.front import DEFAULT_WORKSPACE, INTERRUPTED, complain, open_workspace, plan_of, run
from pipeline.options import (
    ArmsOption,
    DeepOption,
    DryRunOption,
    ExperimentArgument,
    ForceOption,
    LayerOption,
    SeedsOption,
    WorkspaceOption,
)
from pipeline.serve import serve
from pipeline.tidy import workspace_app
from pipeline.train.track import Service

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pipeline.artefacts.manifest import Artefact
    from pipeline.artefacts.storage import Storage
    from pipeline.artefacts.workspace import Workspace
    from pipeline.study.plan import Plan

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Extract activations once, train every ablation arm of the contrastive SAE from them, compare the arms.",
)
store_app = typer.Typer(no_args_is_help=True, help="Describe or verify an activation store.")
app.add_typer(store_app, name="store")
app.add_typer(workspace_app, name="workspace")
console = Console(markup=False)
"""Paths and messages may hold brackets, which are no markup."""

StoreArgument = Annotated[str, typer.Argument(metavar="PATH", help="Folder or s3:// URL of a store.")]
PROGRAM = "dasae"
UsageError: Any = typer.BadParameter.__base__
"""Base of the errors that Typer raises for an invalid command line. Typer exports only the subclass BadParameter."""


class Format(StrEnum):
    """Values of `dasae export --to`."""

    saelens = "saelens"
    hub = "hub"


@app.callback()
def global_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options before the command. `main` reads --debug from the command line itself."""


@app.command()
def ablate(
    experiment: ExperimentArgument,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    arms: ArmsOption = None,
    seeds: SeedsOption = None,
    layer: LayerOption = None,
    dry_run: DryRunOption = False,
) -> None:
    """Extract, train, evaluate and report; only what is missing."""
    plan = _plan(experiment, arms, seeds, layer)
    if dry_run:
        _estimate(plan)
        return
    opened = open_workspace(workspace)
    _extract(plan, opened)
    failed = _train(plan, opened)
    failed |= _evaluate(plan, opened)
    # The report shows the whole study, also when only a part of it was run now.
    _report(plan_of(experiment), opened)
    raise typer.Exit(int(failed))


@app.command()
def extract(
    experiment: ExperimentArgument,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    dry_run: DryRunOption = False,
    deep: DeepOption = False,
    force: ForceOption = False,
) -> None:
    """Fill the activation store and the probe stores; repair them where files are missing or damaged."""
    plan = plan_of(experiment)
    if dry_run:
        from pipeline.extract.estimate import describe

        console.print(describe(plan), highlight=False, soft_wrap=True)
        return
    opened = open_workspace(workspace)
    _discard(plan.extracted, opened, force)
    _extract(plan, opened, deep)


@app.command()
def train(
    experiment: ExperimentArgument,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    arms: ArmsOption = None,
    seeds: SeedsOption = None,
    layer: LayerOption = None,
    track: Annotated[Service | None, typer.Option("--track", help="Show the training logs live in this service.")] = None,
    force: ForceOption = False,
) -> None:
    """Train the missing SAEs, all on the same batches from the store. Exit status 1 when one failed."""
    plan, opened = _plan(experiment, arms, seeds, layer), open_workspace(workspace)
    _discard(plan.trained, opened, force)
    raise typer.Exit(int(_train(plan, opened, track)))


@app.command()
def feed(experiment: ExperimentArgument, workspace: WorkspaceOption = DEFAULT_WORKSPACE) -> None:
    """Make rows of a stream for the trainings that read it, beside them, until nobody has read it for a minute."""
    from pipeline.extract.extraction import row_maker
    from pipeline.store.reader import ActivationStore
    from pipeline.store.ring import PATIENCE, Ring

    plan, opened = plan_of(experiment), open_workspace(workspace)
    if plan.experiment.store.mode != "stream":
        raise BadInputError(f'{experiment} has store.mode "keep", and only "stream" has rows to be made while training')
    opened.require(plan.store, f"dasae extract {plan.experiment.argument}")
    store = ActivationStore(opened.storage(plan.store))
    made = Ring(artefact=plan.store, workspace=opened, store=store, make=row_maker(plan, opened)).feed(PATIENCE)
    console.print(f"feed: {made} shards made", highlight=False)


@app.command()
def evaluate(
    experiment: ExperimentArgument,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
    arms: ArmsOption = None,
    seeds: SeedsOption = None,
    layer: LayerOption = None,
    force: ForceOption = False,
) -> None:
    """Evaluate the trained SAEs. Exit status 1 when one is degenerate or could not be measured."""
    plan, opened = _plan(experiment, arms, seeds, layer), open_workspace(workspace)
    _discard([*plan.evaluated, *plan.model_sides.values()], opened, force)
    raise typer.Exit(int(_evaluate(plan, opened)))


@app.command()
def report(
    experiment: ExperimentArgument,
    other: Annotated[str | None, typer.Argument(metavar="[OTHER]", help="A second experiment to compare with.")] = None,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
) -> None:
    """Write the comparison of the arms, or of two experiments: a page, and the same as JSON and CSV."""
    plan, beside = plan_of(experiment), plan_of(other) if other else None
    if beside and beside.experiment.name == plan.experiment.name:
        raise BadInputError(
            f"{experiment} and {other} are one experiment, or two files of the same name; choose another one"
        )
    opened = open_workspace(workspace)
    if beside:
        _report_both(plan, beside, opened)
    else:
        _report(plan, opened)


app.command()(serve)
app.command("plan")(foresee)


@app.command()
def status(experiment: ExperimentArgument, workspace: WorkspaceOption = DEFAULT_WORKSPACE) -> None:
    """Show what is done, partial or missing, and the next command."""
    from pipeline.study.status import Status

    found = Status(plan_of(experiment), open_workspace(workspace, only_read=True))
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
    """Check that every committed file exists and has its size. Exit status 1 when one does not."""
    from pipeline.store.verify import damages

    found = damages(_store(store), deep=deep)
    for damage in found:
        _point_out("damaged", f"{damage}")
    how = "every checksum compared" if deep else "sizes compared; --deep compares every checksum"
    console.print(f"{len(found)} files damaged ({how})" if found else f"no damage ({how})", highlight=False)
    raise typer.Exit(int(bool(found)))


@app.command()
def export(
    sae: Annotated[str, typer.Argument(metavar="SAE", help="A finished SAE, its folder or name; or an experiment.")],
    target: Annotated[str, typer.Argument(metavar="DIR", help="New or empty folder; for the Hub OWNER/NAME.")],
    to: Annotated[Format, typer.Option("--to", help="A folder for SAELens, or the Hugging Face Hub.")] = Format.saelens,
    workspace: WorkspaceOption = DEFAULT_WORKSPACE,
) -> None:
    """Publish a finished SAE, or all of an experiment, verified, in SAELens' format and with model cards."""
    from pipeline.study.experiment import available
    from pipeline.study.exports import publish

    plan = plan_of(sae) if sae.endswith(".toml") or sae in available() else None
    tell = partial(console.print, highlight=False, soft_wrap=True)
    publish(plan or sae, target, open_workspace(workspace), hub=to == Format.hub, tell=tell)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Folder with ae.pt and config.json.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty folder.")],
) -> None:
    """Turn an SAE of dictionary_learning into a folder in SAELens' format, for an experiment's references."""
    from pipeline.sae.foreign import from_dictionary_learning
    from pipeline.sae.formats import place_sae

    sae, metadata = from_dictionary_learning(source)
    place_sae(sae, folder, metadata)
    console.print(f"convert: {source} to {folder}, {sae.activation.architecture}", highlight=False, soft_wrap=True)


def _point_out(word: str, message: str) -> None:
    """Print a line that begins with a bold word."""
    console.print(Text.assemble((word, "bold"), f": {message}"), soft_wrap=True)


def _plan(experiment: str, arms: str | None, seeds: str | None, layer: int | None) -> "Plan":
    """The part of the experiment that --arms, --seeds and --layer pick."""
    try:
        numbers = None if seeds is None else [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise BadInputError(f"--seeds {seeds!r}: give whole numbers separated by commas, such as 0,1") from None
    names = None if arms is None else [arm.strip() for arm in arms.split(",")]
    return plan_of(experiment, names, numbers, layer)


def _store(place: str) -> "Storage":
    from pipeline.artefacts.storage import open_storage
    from pipeline.store import format as fmt

    storage = open_storage(place)
    # A store that lost its layout or its commits is damaged, not absent.
    if not fmt.is_laid_out(storage) and not storage.sizes(fmt.COMMITS):
        raise BadInputError(f"{place} is no activation store; those of a workspace are in its folders stores/ and probes/")
    return storage


def _discard(artefacts: "Sequence[Artefact]", workspace: "Workspace", force: bool) -> None:
    for artefact in artefacts if force else ():
        workspace.discard(artefact)


def _extract(plan: "Plan", workspace: "Workspace", deep: bool = False) -> None:
    from pipeline.extract.extraction import extract

    made = extract(plan, workspace, deep=deep)
    console.print(f"extract: {len(made)} made, {len(plan.extracted) - len(made)} were there", highlight=False)


def _train(plan: "Plan", workspace: "Workspace", track: Service | None = None) -> bool:
    from pipeline.extract.extraction import row_maker
    from pipeline.train.training import train

    result = train(plan, workspace, track, row_maker=row_maker)
    there = len(plan.saes) - len(result.made) - len(result.failed)
    brought = sum(sae in plan.from_outside for sae in result.made)
    from_outside = f", {brought} from outside" if brought else ""
    console.print(f"train: {len(result.made) - brought} SAEs trained{from_outside}, {there} were there", highlight=False)
    for sae, why in result.failed.items():
        _point_out("failed", f"{sae}: {why}; not published")
    return bool(result.failed)


def _evaluate(plan: "Plan", workspace: "Workspace") -> bool:
    from pipeline.evaluate.evaluation import evaluate

    result = evaluate(plan, workspace)
    there = len(plan.saes) - len(result.made) - len(result.untrained) - len(result.failed)
    console.print(f"evaluate: {len(result.made)} SAEs evaluated, {there} were there", highlight=False)
    for sae in result.untrained:
        _point_out("not trained", f"{sae}")
    for sae, why in result.degenerate.items():
        _point_out("degenerate", f"{sae}: {why}")
    for sae, why in result.failed.items():
        _point_out("failed", f"{sae}: {why}")
    return bool(result.degenerate or result.failed)


def _estimate(plan: "Plan") -> None:
    from pipeline.extract import estimate
    from pipeline.study import gpu_hours

    console.print(f"{estimate.describe(plan)}\n{gpu_hours.describe(plan)}", highlight=False, soft_wrap=True)


def _report(plan: "Plan", workspace: "Workspace") -> None:
    from pipeline.report.collect import collect
    from pipeline.report.page import write_report
    from pipeline.report.terminal import results_table

    results = collect(plan, workspace)
    page = write_report(results, workspace.report(plan.experiment.name))
    console.print(results_table(results))
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


def _report_both(plan: "Plan", other: "Plan", workspace: "Workspace") -> None:
    from pipeline.report.collect import collect
    from pipeline.report.versus import write_comparison

    place = workspace.report(f"{plan.experiment.name}-beside-{other.experiment.name}")
    page = write_comparison(collect(plan, workspace), collect(other, workspace), place)
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the command line. Exit code 2 for bad input, 1 for failure, each with one line that says why."""
    sys.exit(run(_command_line, debug="--debug" in sys.argv))


def _command_line() -> int:
    try:
        code = app(prog_name=PROGRAM, standalone_mode=False)
    except UsageError as error:
        message = " ".join(error.format_message().split()).replace("Value error, ", "")
        if message:  # empty if no command was given: Typer has then shown the help
            command = error.ctx.command_path if error.ctx else PROGRAM
            complain(f"{message[0].lower()}{message[1:].rstrip('.')}; see {command} --help")
        return 2
    except typer.Abort:
        raise KeyboardInterrupt from None
    if code == INTERRUPTED:  # how Typer reports Ctrl-C
        raise KeyboardInterrupt
    return code or 0
