"""Where artefacts live: one folder each, named by what it holds and a hash of everything that determines its bytes.

An artefact exists when its `manifest.json` does; the manifest is written last, atomically. A folder without one is work
in progress that its stage may resume or overwrite.
"""

import fcntl
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

import pipeline
from pipeline.errors import BadInputError, CorruptArtefactError, MissingArtefactError
from pipeline.identity import key_of, sha256_file

Kind = Literal["models", "stores", "probes", "saes", "evaluations"]
MANIFEST = "manifest.json"
LIBRARIES = ("numpy", "numcodecs", "sae-bench", "sae-lens", "scikit-learn", "tokenizers", "torch", "transformers", "zarr")


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """Something the pipeline makes: its kind, a readable label, and the inputs that determine its bytes."""

    kind: Kind
    label: str
    inputs: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        """12 hexadecimal digits of the hash of `inputs`."""
        return key_of(self.inputs)

    @property
    def name(self) -> str:
        """Folder name: the label made safe for any file system, then the key."""
        safe = re.sub(r"[^a-z0-9._]+", "-", self.label.lower()).strip("-.")[:80]
        return f"{safe}-{self.key}"

    @property
    def path(self) -> str:
        """Path inside the workspace."""
        return f"{self.kind}/{self.name}"


class FileRecord(BaseModel):
    """Size and hash of one file of an artefact."""

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a finished artefact is, what it was made from, by whom and when."""

    model_config = ConfigDict(frozen=True)

    kind: Kind
    key: str
    inputs: dict[str, Any]
    files: dict[str, FileRecord]
    parents: dict[str, str] = {}
    """Manifest hashes of the very artefacts this one speaks of; it is out of date when one of them was made again."""
    facts: dict[str, Any] = {}
    """Numbers worth knowing without opening the artefact: rows, bytes, steps, seconds."""
    versions: dict[str, str]
    host: str
    finished: str


class Workspace:
    """A folder of artefacts. Every method is safe to call from several processes at once."""

    def __init__(self, root: Path | str):
        self.root = Path(root)
        if self.root.exists() and not self.root.is_dir():
            raise BadInputError(f"workspace {self.root} is not a folder; name another one with --workspace")

    def folder(self, artefact: Artefact) -> Path:
        """Where the artefact lies, whether or not it exists yet."""
        return self.root / artefact.kind / artefact.name

    def report_folder(self, experiment: str) -> Path:
        """Where the report of an experiment lies."""
        return self.root / "reports" / experiment

    def manifest(self, artefact: Artefact) -> Manifest | None:
        """The manifest of a finished, unchanged and current artefact; None when it is still to be made.

        Raises CorruptArtefactError when a manifest exists but the artefact is not what it says, and BadInputError when it is
        the manifest of another artefact.
        """
        folder = self.folder(artefact)
        try:
            manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError:
            raise CorruptArtefactError(f"{folder / MANIFEST} cannot be read; {_remedy(folder)}") from None
        if manifest.key != artefact.key:
            raise BadInputError(
                f"{folder} holds the artefact {manifest.key}, which does not belong to this experiment; "
                f"move it away and run again"
            )
        for name, record in manifest.files.items():
            size = (folder / name).stat().st_size if (folder / name).is_file() else None
            if size != record.bytes:
                found = "is missing" if size is None else f"has {size} bytes instead of {record.bytes}"
                raise CorruptArtefactError(f"{folder / name} {found}; {_remedy(folder)}")
        if any(self.fingerprint(path) != known for path, known in manifest.parents.items()):
            return None
        return manifest

    def require(self, artefact: Artefact, command: str) -> Manifest:
        """The manifest of an artefact that another stage must have made; `command` is how to make it."""
        manifest = self.manifest(artefact)
        if manifest is None:
            raise MissingArtefactError(f"{self.folder(artefact)} does not exist yet; make it with: {command}")
        return manifest

    def fingerprint(self, path: str) -> str | None:
        """Hash of the manifest of the artefact at `path`, which names one particular making of it."""
        manifest = self.root / path / MANIFEST
        return sha256_file(manifest) if manifest.is_file() else None

    def verified(self, artefact: Artefact, name: str) -> Path:
        """Path of one file of a finished artefact after comparing its hash with the manifest's."""
        manifest = self.manifest(artefact)
        path = self.folder(artefact) / name
        if manifest is None or name not in manifest.files:
            raise MissingArtefactError(f"{path} is not part of a finished artefact")
        if sha256_file(path) != manifest.files[name].sha256:
            raise CorruptArtefactError(f"{path} was changed after it was made; {_remedy(path.parent)}")
        return path

    @contextmanager
    def lock(self, artefact: Artefact) -> Iterator[Path]:
        """Hold the artefact's lock, waiting for another process that makes it; yields its folder, created if need be.

        The kernel drops the lock when its holder dies, however it dies.
        """
        locks = self.root / ".locks"
        locks.mkdir(parents=True, exist_ok=True)
        with (locks / f"{artefact.kind}-{artefact.name}").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            folder = self.folder(artefact)
            folder.mkdir(parents=True, exist_ok=True)
            yield folder

    def publish(
        self,
        artefact: Artefact,
        *,
        files: Iterable[str] | None = None,
        parents: Iterable[Artefact] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> Manifest:
        """Write the manifest, after which the artefact exists. Call it with the lock held and every file complete.

        `files` are the paths to record, relative to the folder; all files by default.
        """
        folder = self.folder(artefact)
        if files is None:
            files = (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        records: dict[str, FileRecord] = {}
        for name in sorted(set(files) - {MANIFEST}):
            path = folder / name
            fsync(path)
            records[name] = FileRecord(bytes=path.stat().st_size, sha256=sha256_file(path))
        manifest = Manifest(
            kind=artefact.kind,
            key=artefact.key,
            inputs=json.loads(json.dumps(artefact.inputs)),
            files=records,
            parents={parent.path: self.fingerprint(parent.path) or "" for parent in parents},
            facts=dict(facts or {}),
            versions=library_versions(),
            host=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
            finished=datetime.now(UTC).isoformat(timespec="milliseconds"),
        )
        write_atomically(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())
        return manifest


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or nothing: a temporary beside it, synced, then renamed over it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    temporary.write_bytes(content)
    fsync(temporary)
    temporary.replace(path)
    fsync(path.parent)


def fsync(path: Path) -> None:
    """Force a file's or a folder's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def library_versions() -> dict[str, str]:
    """Versions of this package and of the libraries whose behaviour an artefact depends on."""
    versions = {"direction-aware-sae": pipeline.__version__}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions


def _remedy(folder: Path) -> str:
    return f"delete {folder} and run the same command again"
