"""Defines the sections [references.NAME]: SAEs that others trained, to stand beside the arms."""

from collections.abc import Mapping
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
    revision: str | None = None
    """Its commit; a branch may move."""
    folder: str = ""
    """The folder in it."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.repository is None):
            raise ValueError("give either path, a folder, or repository, on the Hub")
        if self.path and (self.revision or self.folder):
            raise ValueError(f"revision and folder are for a repository, and {self.path!r} is a path; remove them")
        if self.repository and not COMMIT.fullmatch(self.revision or ""):
            raise ValueError(needs_commit(self.repository, self.revision))
        return self

    def content(self, name: str) -> Mapping[str, str]:
        """Identifies its files: a path by what they hold, a repository by its commit.

        Raises BadInputError where one of a path is missing; `name` is its own.
        """
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
