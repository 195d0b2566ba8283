"""What of a study is done, partial or missing in a workspace, and which command comes next."""

from rich import box
from rich.filesize import decimal
from rich.table import Table

from pipeline.plan import Plan
from pipeline.store.format import is_laid_out
from pipeline.store.writer import ShardWriter
from pipeline.workspace import Artefact, Workspace


def status_table(plan: Plan, workspace: Workspace) -> Table:
    """One line per artefact of the study; SAEs and evaluations with those of the same arm and layer together."""
    table = Table(title=f"{plan.experiment.name} in {workspace.root}", box=box.SIMPLE_HEAD)
    for column in ("what", "state", "done"):
        table.add_column(column)
    table.add_column("bytes", justify="right")
    table.add_column("path", overflow="fold")
    for artefact in plan.extracted:
        state, done = _state(artefact, workspace)
        table.add_row(artefact.kind, state, done, decimal(_bytes(artefact, workspace)), artefact.path)
    for kind in ("saes", "evaluations"):
        for arm, layer in dict.fromkeys((sae.arm, sae.layer) for sae in plan.saes):
            group = [
                sae.artefact if kind == "saes" else sae.evaluation
                for sae in plan.saes
                if (sae.arm, sae.layer) == (arm, layer)
            ]
            done = sum(workspace.manifest(artefact) is not None for artefact in group)
            state = "done" if done == len(group) else "partial" if done else "missing"
            size = decimal(sum(_bytes(artefact, workspace) for artefact in group))
            table.add_row(kind, state, f"{done} of {len(group)} seeds", size, f"{arm}, layer {layer}")
    return table


def next_command(plan: Plan, workspace: Workspace) -> str:
    """The command that brings the study further, or where its report is."""
    argument = plan.experiment.argument
    if not all(workspace.manifest(artefact) for artefact in plan.extracted):
        return f"next: dasae extract {argument}   (or everything at once: dasae ablate {argument})"
    if not all(workspace.manifest(sae.artefact) for sae in plan.saes):
        return f"next: dasae train {argument}"
    if not all(workspace.manifest(sae.evaluation) for sae in plan.saes):
        return f"next: dasae evaluate {argument}"
    report = workspace.report(plan.experiment.name)
    done = report.size("index.html") is not None
    return f"all done; report: {report}/index.html" if done else f"next: dasae report {argument}"


def _state(artefact: Artefact, workspace: Workspace) -> tuple[str, str]:
    manifest, storage = workspace.manifest(artefact), workspace.storage(artefact)
    if manifest:
        rows = manifest.facts.get("rows")
        return "done", f"{rows:,} rows" if rows else ""
    if artefact.kind in ("stores", "probes") and is_laid_out(storage):
        writer = ShardWriter(storage)
        return "partial", f"{writer.layout.shards - len(writer.missing())} of {writer.layout.shards} shards"
    return ("partial", "") if storage.sizes() else ("missing", "")


def _bytes(artefact: Artefact, workspace: Workspace) -> int:
    manifest = workspace.manifest(artefact)
    if manifest:
        # A store's manifest lists its commits; the shards that those list are not listed again.
        return int(manifest.facts.get("bytes", 0)) + sum(record.bytes for record in manifest.files.values())
    return sum(workspace.storage(artefact).sizes().values())
