"""Defines the sections [references.NAME]: SAEs that others trained, to stand beside the arms."""

import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from pipeline.artefacts.identity import fingerprint
from pipeline.errors import BadInputError
from pipeline.models.access import fetch
from pipeline.section import COMMIT, Section, needs_commit

FILES = ("cfg.json", "sae_weights.safetensors")
"""Of an SAE in SAELens' format."""


class Reference(Section):
    """An SAE that others trained. It is evaluated and shown beside the arms, and is in no difference between them."""

    layer: Annotated[int, Field(ge=0)]
    """The layer after which it reads the residual stream."""
    path: Annotated[str | None, Field(min_length=1)] = None
    """A folder in SAELens' format. `dasae convert` makes one of a dictionary of `dictionary_learning`."""
    repository: Annotated[str | None, Field(min_length=1)] = None
    """Or a repository of the Hugging Face Hub with such a folder."""
    folder: str = ""
    """The folder in it."""
    release: Annotated[str | None, Field(min_length=1)] = None
    """Or a release that SAELens knows by name."""
    sae_id: Annotated[str | None, Field(min_length=1)] = None
    """The SAE in it."""
    revision: str | None = None
    """The commit of the repository, also of a release's; a branch may move."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if sum(place is not None for place in (self.path, self.repository, self.release)) != 1:
            raise ValueError("give one of path, a folder, repository, on the Hub, or release, known to SAELens")
        if self.path and (self.revision or self.folder):
            raise ValueError(f"revision and folder are for a repository, and {self.path!r} is a path; remove them")
        if self.release and self.folder:
            raise ValueError("folder is for a repository; a release has sae_id")
        if bool(self.release) != bool(self.sae_id):
            raise ValueError("release and sae_id go together: name both, or neither")
        if self.release and self.sae_id:
            check_registered(self.release, self.sae_id)
        named = self.repository or (self.release and repository_of(self.release))
        if named and not COMMIT.fullmatch(self.revision or ""):
            raise ValueError(needs_commit(named, self.revision))
        return self

    def content(self, name: str) -> Mapping[str, str]:
        """Identifies its files: a path by what they hold, the others by a commit.

        Raises BadInputError where one of a path is missing; `name` is its own.
        """
        if self.release:
            return {"release": self.release, "sae_id": str(self.sae_id), "revision": str(self.revision)}
        if self.path is None:
            return {"repository": str(self.repository), "revision": str(self.revision), "folder": self.folder}
        folder = Path(self.path)
        for file in FILES:
            if not (folder / file).is_file():
                raise BadInputError(f"references.{name}.path: {folder} has no {file}: it is no SAE in SAELens' format")
        return {"files": fingerprint((file, folder / file) for file in FILES)}

    def local(self) -> Path:
        """The folder, fetched if need be. Raises ModelAccessError, which says why it cannot be."""
        if self.path is not None:
            return Path(self.path)
        names = [f"{self.folder.strip('/')}/{file}".lstrip("/") for file in FILES]
        config, _ = [fetch(str(self.repository), self.revision, name, "SAE") for name in names]
        return config.parent


def check_registered(release: str, sae_id: str) -> None:
    """Raise ValueError, which names the nearest that there are, for an SAE that SAELens does not know by name."""
    known = _registry()
    if release not in known:
        raise ValueError(f"SAELens {version('sae-lens')} knows no release {release!r}{_nearest(release, known)}")
    ids = re.findall(r"^ *- id: (\S+)$", known[release], re.MULTILINE)
    if sae_id not in ids:
        raise ValueError(f"release {release!r} has no SAE {sae_id!r}{_nearest(sae_id, ids)}")


def repository_of(release: str) -> str:
    """The repository of a release that SAELens knows."""
    found = re.search(r"^  repo_id: (\S+)$", _registry()[release], re.MULTILINE)
    return found[1] if found else release


@cache
def _registry() -> dict[str, str]:
    """The part of SAELens' registry for each release, read as text: its own reader imports torch and takes seconds."""
    spec = find_spec("sae_lens")
    assert spec is not None
    assert spec.origin is not None
    text = (Path(spec.origin).parent / "pretrained_saes.yaml").read_text(encoding="utf-8")
    _, *parts = re.split(r"^(\S+):$", text, flags=re.MULTILINE)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _nearest(name: str, known: Iterable[str]) -> str:
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"; the nearest are {', '.join(near)}" if near else ""
