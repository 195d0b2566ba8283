"""What a report follows from, its manifest, and whether it is current. Scheduled runs ask: no heavy imports."""

import json
from collections.abc import Mapping

from pydantic import BaseModel, ConfigDict

import pipeline
from pipeline.artefacts.identity import SEAL, is_sealed, sealed, sha256
from pipeline.artefacts.manifest import MANIFEST, FileRecord
from pipeline.artefacts.storage import RECORD_BYTES, Storage
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import CorruptArtefactError, MissingArtefactError
from pipeline.study.arms import arms_of
from pipeline.study.evaluations import EVALUATIONS
from pipeline.study.plan import Plan

PAGE = "index.html"
"""The file of a report for a browser."""
UNREADABLE = (FileNotFoundError, CorruptArtefactError, ValueError, TypeError, RecursionError)
"""What reading and parsing a manifest raises if it is gone or damaged. ValidationError is a ValueError."""


class MadeOf(BaseModel):
    """All that a report depends on: when it changes, the report is written again."""

    model_config = ConfigDict(frozen=True)

    version: str
    description: str
    arms: dict[str, tuple[str, str]]
    """Of every arm its question, and the arm that it is compared with."""
    worth: dict[str, float] = {}
    """The section [worth]."""
    evaluations: dict[str, str]
    """Hash of the manifest of every evaluation, by path."""
    table: tuple[str, ...] = ()
    """Names in the table of evaluations, which a script may extend."""


class ReportManifest(BaseModel):
    """The record of a whole report, written last."""

    files: dict[str, FileRecord]
    made_of: MadeOf


def made_of(plan: Plan, workspace: Workspace) -> MadeOf:
    """All that a report depends on: the program's version, the experiment's texts, and the evaluations as they are now."""
    made = [artefact.path for sae in plan.saes for artefact in (sae.evaluation, *sae.apart.values())]
    evaluations = {path: workspace.fingerprint(path) for path in made}
    known = arms_of(plan.experiment.arms)
    return MadeOf(
        version=pipeline.__version__,
        description=plan.experiment.description,
        arms={name: (known[name].question, known[name].against) for name in plan.experiment.study.arms},
        worth=plan.experiment.worth.model_dump(),
        evaluations={path: found for path, found in evaluations.items() if found},
        table=tuple(EVALUATIONS),
    )


def publish_report(place: Storage, files: Mapping[str, bytes], follows_from: MadeOf) -> None:
    """Write the files of a report, and its manifest last: without it the report does not count as current."""
    place.delete(MANIFEST)
    place.sweep()
    for name, content in files.items():
        place.write(name, content)
    records = {name: FileRecord(bytes=len(content), sha256=sha256(content)) for name, content in files.items()}
    record = ReportManifest(files=records, made_of=follows_from).model_dump(mode="json")
    place.write(MANIFEST, json.dumps(sealed(record), indent=1, ensure_ascii=False).encode())


def read_report(place: Storage, name: str, remedy: str) -> bytes:
    """A file of a whole report. `remedy` is the end of the errors' messages.

    Raises MissingArtefactError for a report that was not written to its end, and CorruptArtefactError for a file that is not
    as the manifest says.
    """
    manifest = _manifest(place)
    if manifest is None or name not in manifest.files:
        raise MissingArtefactError(f"{place} holds no whole report; {remedy}")
    if (content := _as_recorded(place, name, manifest.files[name])) is None:
        raise CorruptArtefactError(f"{place}/{name} is missing or was changed after it was written; {remedy}")
    return content


def is_current(plan: Plan, workspace: Workspace) -> bool:
    """True if the report in the workspace shows all that is evaluated, and its files are as its manifest says."""
    place = workspace.report(plan.experiment.name)
    manifest = _manifest(place)
    if manifest is None or manifest.made_of != made_of(plan, workspace):
        return False
    return all(_as_recorded(place, name, known) is not None for name, known in manifest.files.items())


def _manifest(place: Storage) -> ReportManifest | None:
    """The manifest; None where it is missing or damaged."""
    try:
        record = json.loads(place.read(MANIFEST, RECORD_BYTES))
        return ReportManifest.model_validate(record) if SEAL in record and is_sealed(record) else None
    except UNREADABLE:
        return None


def _as_recorded(place: Storage, name: str, known: FileRecord) -> bytes | None:
    """A file's content; None where it is not what the manifest says."""
    try:
        content = place.read(name, known.bytes)
    except (FileNotFoundError, CorruptArtefactError):  # gone, or too long
        return None
    return content if sha256(content) == known.sha256 else None
