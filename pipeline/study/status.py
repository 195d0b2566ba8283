"""Shows the status of a study in a workspace: what is done, partial or missing, and which command comes next."""

import shlex
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from rich import box
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from pipeline.artefacts.glance import Glance
from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.workspace import Workspace
from pipeline.store.format import is_laid_out
from pipeline.store.writer import ShardWriter
from pipeline.study.plan import Plan
from pipeline.study.reports import is_current

LOOKED_UP_AT_ONCE = 12
"""Artefacts looked up in parallel: on an object store each look-up waits for replies, and a study has hundreds."""


@dataclass(frozen=True, kw_only=True)
class State:
    """The state of one artefact."""

    word: str
    """`done`, `partial` or `missing`."""
    detail: str
    bytes: int


class Status:
    """The state of every artefact of a study in a workspace, at the time of creation."""

    def __init__(self, plan: Plan, workspace: Workspace):
        everything = [*plan.extracted, *plan.trained, *plan.evaluated]
        with Glance.at(workspace) as seen, ThreadPoolExecutor(LOOKED_UP_AT_ONCE) as pool:
            self.plan, self.workspace = plan, seen
            states = pool.map(self._state, everything)
            self.found = {artefact.path: state for artefact, state in zip(everything, states, strict=True)}

    def table(self) -> Table:
        """One line for each artefact; SAEs and evaluations of one arm and layer share a line."""
        table = Table(
            title=Text(f"{self.plan.experiment.name} in {self.workspace.root}", "table.title"), box=box.SIMPLE_HEAD
        )
        for column in ("what", "state", "done"):
            table.add_column(column)
        table.add_column("bytes", justify="right")
        table.add_column("path", overflow="fold")
        for artefact in self.plan.extracted:
            found = self.found[artefact.path]
            table.add_row(artefact.kind, found.word, found.detail, decimal(found.bytes), artefact.path)
        for kind in ("saes", "evaluations"):
            for arm, layer in dict.fromkeys((sae.arm, sae.layer) for sae in self.plan.saes):
                group = [
                    self.found[artefact.path]
                    for sae in self.plan.saes
                    for artefact in ([sae.artefact] if kind == "saes" else [sae.evaluation, *sae.apart.values()])
                    if (sae.arm, sae.layer) == (arm, layer)
                ]
                done = sum(found.word == "done" for found in group)
                begun = any(found.word != "missing" for found in group)
                state = "done" if done == len(group) else "partial" if begun else "missing"
                size = decimal(sum(found.bytes for found in group))
                table.add_row(kind, state, f"{done} of {len(group)}", size, f"{arm}, layer {layer}")
        return table

    def next_command(self) -> str:
        """The next command for the study, or where its report is."""
        if not self._done(self.plan.extracted):
            return f"next: {self._command('extract')}   (or everything at once: {self._command('ablate')})"
        if not self._done(self.plan.trained):
            return f"next: {self._command('train')}"
        if not self._done(self.plan.evaluated):
            return f"next: {self._command('evaluate')}"
        if not is_current(self.plan, self.workspace):
            return f"next: {self._command('report')}"
        return f"all done; report: {self.workspace.report(self.plan.experiment.name)}/index.html"

    def _command(self, stage: str) -> str:
        """A command that does the same in any shell: with the workspace, and quoted."""
        return shlex.join(["dasae", stage, self.plan.experiment.argument, "--workspace", str(self.workspace.root)])

    def _done(self, artefacts: Sequence[Artefact]) -> bool:
        return all(self.found[artefact.path].word == "done" for artefact in artefacts)

    def _state(self, artefact: Artefact) -> State:
        manifest, storage = self.workspace.manifest(artefact), self.workspace.storage(artefact)
        if manifest:
            # A store's manifest lists only its commits; `facts` has the bytes of the shards.
            size = int(manifest.facts.get("bytes", 0)) + sum(record.bytes for record in manifest.files.values())
            rows = manifest.facts.get("rows")
            streamed = f", {manifest.facts['streamed']:,} streamed" if "streamed" in manifest.facts else ""
            return State(word="done", detail=f"{rows:,} rows{streamed}" if rows else "", bytes=size)
        size = sum(storage.sizes().values())
        if artefact.kind in ("stores", "probes") and is_laid_out(storage):
            writer = ShardWriter(storage)
            shards = len(writer.layout.present)
            return State(word="partial", detail=f"{shards - len(writer.missing())} of {shards} shards", bytes=size)
        return State(word="partial" if size else "missing", detail="", bytes=size)
