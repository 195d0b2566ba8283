"""Defines artefacts and their manifests: inputs, files with checksums, parents, facts, library versions."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

import pipeline
from pipeline.artefacts.identity import is_sealed, key_of
from pipeline.artefacts.storage import RECORD_BYTES, Storage
from pipeline.errors import CorruptArtefactError

Kind = Literal["models", "stores", "probes", "saes", "evaluations"]
MANIFEST = "manifest.json"
RESERVED = b"reserved for "
"""How the manifest begins while a machine publishes the artefact to an object store (`leases.fenced`)."""
LIBRARIES = ("numpy", "numcodecs", "sae-bench", "sae-lens", "scikit-learn", "tokenizers", "torch", "transformers", "zarr")


@dataclass(frozen=True, kw_only=True)
class Artefact:
    """Something that the pipeline makes: its kind, a readable label, and the inputs that determine its bytes."""

    kind: Kind
    label: str
    inputs: Mapping[str, Any]

    @cached_property
    def key(self) -> str:
        """12 hexadecimal digits of the hash of `inputs`."""
        return key_of(self.inputs)

    @property
    def name(self) -> str:
        """Folder name: the label, reduced to characters that every file system allows, then the key."""
        safe = re.sub(r"[^a-z0-9._]+", "-", self.label.lower()).strip("-.")[:80]
        return f"{safe}-{self.key}"

    @property
    def path(self) -> str:
        """Path of the folder inside the workspace."""
        return f"{self.kind}/{self.name}"


class FileRecord(BaseModel):
    """Size and hash of one file of an artefact."""

    bytes: int
    sha256: str


class Manifest(BaseModel):
    """The record of a finished artefact: what it is, what it was made from, where and when."""

    model_config = ConfigDict(frozen=True)

    kind: Kind
    key: str
    inputs: dict[str, Any]
    files: dict[str, FileRecord]
    parents: dict[str, str] = {}
    """SHA-256 of the manifests of the artefacts that this one was made from, by path; "" for one that did not exist. This
    artefact is stale when one of them has changed."""
    facts: dict[str, Any] = {}
    """Numbers worth knowing without opening the artefact: rows, bytes, steps, seconds."""
    versions: dict[str, str]
    host: str
    finished: str


def manifest_bytes(storage: Storage) -> bytes | None:
    """The content of an artefact's manifest; None where there is none, or its name is only reserved."""
    content = _content(storage)
    return None if content is None or content.startswith(RESERVED) else content


def is_reserved(storage: Storage) -> bool:
    """Whether somebody reserved the name of the manifest and has not written it."""
    content = _content(storage)
    return content is not None and content.startswith(RESERVED)


def _content(storage: Storage) -> bytes | None:
    try:
        return storage.read(MANIFEST, RECORD_BYTES)
    except FileNotFoundError:
        return None


def read_manifest(storage: Storage, remedy: str) -> Manifest | None:
    """The manifest of an artefact; None where there is none.

    Raises CorruptArtefactError for one that cannot be read or was changed; `remedy` is the end of its message.
    """
    if (content := manifest_bytes(storage)) is None:
        return None
    try:
        manifest, unchanged = Manifest.model_validate_json(content), is_sealed(json.loads(content))
    except (ValueError, RecursionError):  # ValidationError is a ValueError, too
        raise CorruptArtefactError(f"{storage}/{MANIFEST} cannot be read; {remedy}") from None
    if not unchanged:
        raise CorruptArtefactError(f"{storage}/{MANIFEST} was changed after it was written; {remedy}")
    return manifest


def library_versions() -> dict[str, str]:
    """Versions of this package and of the libraries whose behaviour an artefact depends on."""
    versions = {"direction-aware-sae": pipeline.__version__}
    for library in LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            continue
    return versions
