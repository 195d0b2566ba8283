"""Finds what lies in a workspace and belongs to nobody: leftovers of killed processes, orphans, broken links."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import get_args

from pipeline.artefacts.local_files import is_abandoned, is_temporary
from pipeline.artefacts.manifest import MANIFEST, Kind, read_manifest
from pipeline.artefacts.workspace import LOCKS, REPORTS, RING, Workspace
from pipeline.errors import CorruptArtefactError
from pipeline.study.plan import Plan

SHARDED = ("stores", "probes")
"""Kinds whose manifest does not list every file; their commits do."""


class What(StrEnum):
    """Why something belongs to nobody."""

    leftover = "leftover"
    """Of a process that was killed: temporary files, checkpoints beside a finished SAE, rings of streams, locks."""
    orphan = "orphan"
    """An artefact or report of no experiment that is known."""
    broken_link = "broken link"


@dataclass(frozen=True, kw_only=True)
class Litter:
    """A file or folder that belongs to nobody."""

    what: What
    path: str
    """Inside the workspace."""
    bytes: int
    """That its removal frees: files that stores share stay until the last of them is removed."""


def litter(workspace: Workspace, plans: Sequence[Plan]) -> list[Litter]:
    """What belongs to nobody, given all experiments that are known. Nothing that a living process works on is listed."""
    known = {
        artefact.path
        for plan in plans
        for artefact in (*plan.extracted, *plan.trained, *plan.evaluated, *plan.model_sides.values())
    }
    reports = {plan.experiment.name for plan in plans}
    found = [*_orphans(workspace, known, reports)]
    orphans = tuple(f"{one.path}/" for one in found)
    if not workspace.remote:
        found += [one for one in _left(workspace) if not one.path.startswith(orphans)]
    return sorted(found, key=lambda one: (one.what, one.path))


def remove(workspace: Workspace, found: Iterable[Litter]) -> Iterator[Litter]:
    """Remove litter, and yield what is gone. What a process has begun to work on meanwhile stays."""
    for one in found:
        if workspace.remove(one.path):
            yield one


def _orphans(workspace: Workspace, known: set[str], reports: set[str]) -> Iterator[Litter]:
    for kind in (*get_args(Kind), REPORTS):
        sizes = _folders(workspace, kind)
        for folder, size in sizes.items():
            path = f"{kind}/{folder}"
            mine = path in known or (kind == REPORTS and set(folder.split("-beside-")) <= reports)
            if not mine and not workspace.is_locked(path):
                yield Litter(what=What.orphan, path=path, bytes=size)


def _folders(workspace: Workspace, kind: str) -> dict[str, int]:
    """Folders of a kind and their bytes. On a file system also those with nothing but links that lead nowhere."""
    if not workspace.remote:
        return {folder.name: _bytes(folder) for folder in sorted((workspace.local / kind).glob("*/"))}
    sizes: dict[str, int] = {}
    for name, size in workspace.place(kind).sizes().items():
        folder = name.partition("/")[0]
        sizes[folder] = sizes.get(folder, 0) + size
    return sizes


def _left(workspace: Workspace) -> Iterator[Litter]:
    root = workspace.local
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.is_symlink() and not path.exists():
            yield Litter(what=What.broken_link, path=name, bytes=0)
        elif (is_temporary(name) and is_abandoned(path)) or (path.parent == root / LOCKS and workspace.is_free(path.name)):
            yield Litter(what=What.leftover, path=name, bytes=_bytes(path))
    for path in sorted(root.glob(f"stores/*/{RING}")):
        name = path.relative_to(root).as_posix()
        if not workspace.is_locked(path.parent.relative_to(root).as_posix()):
            yield Litter(what=What.leftover, path=name, bytes=_bytes(path))
    for kind in get_args(Kind):
        for folder in () if kind in SHARDED else sorted((root / kind).glob("*/")):
            yield from _beside(workspace, f"{kind}/{folder.name}")


def _beside(workspace: Workspace, path: str) -> Iterator[Litter]:
    """What lies in the folder of a finished artefact and is not in its manifest."""
    try:
        manifest = read_manifest(workspace.place(path), "")
    except CorruptArtefactError:
        return
    if manifest is None or workspace.is_locked(path):
        return
    listed = {MANIFEST, *(name.partition("/")[0] for name in manifest.files)}
    for entry in sorted((workspace.local / path).iterdir()):
        if entry.name not in listed and not is_temporary(entry.name) and entry.exists():
            yield Litter(what=What.leftover, path=f"{path}/{entry.name}", bytes=_bytes(entry))


def _bytes(path: Path) -> int:
    files = path.rglob("*") if path.is_dir() and not path.is_symlink() else [path]
    found = (file.lstat() for file in files if file.is_file())
    return sum(stat.st_size for stat in found if stat.st_nlink == 1)
