"""Reads a workspace in every way that there is: as notebooks do, and by every command that depends on a file."""

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from campaign.cases import Place
from campaign.judge import Verdict, differences, files, judged, refused
from campaign.studies import STAGES, Study
from campaign.workers import Ended, command, run

MAKES = {"extract": ("stores", "probes", "models"), "train": ("saes",), "evaluate": ("evaluations",), "report": ("reports",)}
"""The kinds that each stage makes."""


def used(study: Study, place: Place, name: str) -> Verdict:
    """What comes of using a finished workspace in which the file or folder of this name is not as it was."""
    kind, _, rest = name.partition("/")
    for ways in (_as_a_notebook, _by_later_stages):
        if bad := ways(study, place, kind):
            return bad
    if kind == "reports" and differences(files(place.workspace), study.reference("report")) and says_current(study, place):
        return Verdict("false-done", "the report counts as current")
    return _repaired(study, place, kind, rest.partition("/")[0])


def readings(study: Study, workspace: Path, to: Path) -> None:
    """Write hashes of all that a notebook can read; null for what the package refuses in one line."""
    from pipeline import ActivationStore, Experiment, TextReader, Workspace, load_sae, make_plan, read_results, rows_in_order
    from pipeline.errors import PipelineError
    from pipeline.store import format as fmt

    experiment, opened = Experiment.load(str(study.toml)), Workspace(workspace)
    plan = make_plan(experiment)

    def rows(artefact: Any) -> str:
        store = ActivationStore(opened.storage(artefact))
        layer = store.layout.layers[0]
        parts = [row.numpy() for row in rows_in_order(store, layer, store.shards)]
        return _hash(*parts, repr((store.rows, store.scale(layer))))

    def fields(artefact: Any) -> str:
        store = ActivationStore(opened.storage(artefact))
        per_row = [store.read_field(field, *store.row_range(shard)) for shard in store.shards for field in fmt.ROW_FIELDS]
        return _hash(*per_row, *[store.whole(array) for array in fmt.text_arrays(store.layout)])

    def weights(name: Any) -> str:
        return _hash(
            *[tensor.detach().numpy() for tensor in vars(load_sae(name, opened)).values() if hasattr(tensor, "numpy")]
        )

    def numbers(table: str) -> str:
        frame = read_results(experiment, opened, table)
        return _hash(frame.drop(columns=["seconds"], errors="ignore").to_csv())

    ways: dict[str, Callable[[], str]] = {}
    for artefact in (plan.store, *plan.probes.values()):
        ways |= {f"rows {artefact.path}": partial(rows, artefact), f"fields {artefact.path}": partial(fields, artefact)}
    for sae in plan.saes:
        for place in (opened.folder(sae.artefact), sae.artefact.name):
            ways[f"weights {place.name if isinstance(place, Path) else place}"] = partial(weights, place)
    ways |= {table: partial(numbers, table) for table in ("results", "differences")}
    if experiment.argument.endswith("texts.toml"):
        ways["text"] = lambda: _hash(*[x.numpy() for x in TextReader(plan, opened)("return sum(values)").layers.values()])
    found: dict[str, str | None] = {}
    for name, way in ways.items():
        try:
            found[name] = way()
        except PipelineError:
            found[name] = None
    to.write_text(json.dumps(found))


def says_current(study: Study, place: Place) -> bool:
    """Whether a scheduled run would take the report for finished."""

    def ask() -> None:
        from pipeline import Experiment, Workspace, make_plan
        from pipeline.study.reports import is_current

        raise SystemExit(0 if is_current(make_plan(Experiment.load(str(study.toml))), Workspace(place.workspace)) else 3)

    return run(ask, place.folder).code == 0


def _as_a_notebook(study: Study, place: Place, _: str) -> Verdict | None:
    good, to = study.toml.parent / "readings.json", place.folder / "readings.json"
    if not good.exists():
        ended = run(lambda: readings(study, study.after("report"), good), place.folder)
        assert ended.code == 0, ended.output
        shutil.rmtree(study.after("report") / ".locks", ignore_errors=True)
    ended = run(lambda: readings(study, place.workspace, to), place.folder)
    if ended.code != 0:
        return refused(ended) or Verdict("broken-case", ended.last_line)
    expected, found = json.loads(good.read_text()), json.loads(to.read_text())
    other = [name for name, value in found.items() if value is not None and value != expected[name]]
    return Verdict("silent", f"a notebook reads another {other[0]}") if other else None


def _by_later_stages(study: Study, place: Place, kind: str) -> Verdict | None:
    """Every later stage, anew: refused in one line, or the same bytes."""
    first = next(at for at, stage in enumerate(STAGES) if kind in MAKES[stage])
    later = STAGES[first + 1 :] if kind != "reports" else ("report",)
    target = place.folder / "later"
    shutil.copytree(place.workspace, target, symlinks=True)
    for stage in later if kind != "reports" else ():
        for made in MAKES[stage]:
            shutil.rmtree(target / made, ignore_errors=True)
    status = run(command(*study.argv("status", target)), place.folder)
    if bad := refused(status):
        return Verdict(bad.outcome, f"status: {bad.detail}")
    for stage in later:
        ended = run(command(*study.argv(stage, target)), place.folder)
        if bad := refused(ended):
            return Verdict(bad.outcome, f"{stage}: {bad.detail}")
        if ended.code:
            return None
        told = {"evaluate": "not trained: " in ended.output, "report": _tells_what_is_missing(target)}
        if told.get(stage):  # an SAE is gone, and those that are compared with it are evaluated without
            continue
        found, reference = (_only(content, MAKES[stage]) for content in (files(target), study.reference("report")))
        wrong = differences(found, reference)
        if wrong:
            return Verdict("silent", f"{stage}: {'; '.join(wrong[:3])}")
    return None


def _repaired(study: Study, place: Place, kind: str, folder: str) -> Verdict:
    """The remedy that docs/operations.md names, then what follows from it."""
    at = next(at for at, stage in enumerate(STAGES) if kind in MAKES[stage])
    options = ("--deep",) if kind in ("stores", "probes") else ()
    path = place.workspace / kind / folder
    if kind not in ("stores", "probes") and path.is_dir():
        shutil.rmtree(path)
    ended = Ended(0, "")
    for stage in STAGES[at:]:
        ended = run(command(*study.argv(stage, place.workspace, *(options if stage == "extract" else ()))), place.folder)
        if bad := refused(ended):
            return Verdict(bad.outcome, f"the remedy, {stage}: {bad.detail}")
        if ended.code and "move it away" in ended.last_line:
            shutil.rmtree(path, ignore_errors=True)
            ended = run(command(*study.argv(stage, place.workspace)), place.folder)
        if ended.code:
            return Verdict("stuck", f"the remedy, {stage}: exit {ended.code}: {ended.last_line}")
    return judged(ended, place.workspace, study.reference("report"))


def _only(found: dict[str, bytes], kinds: tuple[str, ...]) -> dict[str, bytes]:
    return {name: content for name, content in found.items() if name.startswith(tuple(f"{kind}/" for kind in kinds))}


def _tells_what_is_missing(workspace: Path) -> bool:
    return all(json.loads(path.read_text())["missing"] for path in workspace.glob("reports/*/results.json"))


def _hash(*parts: Any) -> str:
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() if isinstance(part, str) else memoryview(part).cast("B") if part.size else b"")
    return total.hexdigest()
