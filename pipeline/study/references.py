"""Defines the sections [references.NAME]: SAEs that others trained, to stand beside the arms."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from pydantic import Field

from pipeline.artefacts.identity import fingerprint
from pipeline.errors import BadInputError
from pipeline.section import Section

FILES = ("cfg.json", "sae_weights.safetensors")
"""Of an SAE in SAELens' format."""


class Reference(Section):
    """An SAE that others trained. It is evaluated and shown beside the arms, and is in no difference between them."""

    layer: Annotated[int, Field(ge=0)]
    """The layer after which it reads the residual stream."""
    path: Annotated[str, Field(min_length=1)]
    """A folder in SAELens' format. `dasae convert` makes one of a dictionary of `dictionary_learning`."""

    def content(self, name: str) -> Mapping[str, str]:
        """Identifies its files. Raises BadInputError where one is missing; `name` is its own."""
        folder = Path(self.path)
        for file in FILES:
            if not (folder / file).is_file():
                raise BadInputError(f"references.{name}.path: {folder} has no {file}: it is no SAE in SAELens' format")
        return {"files": fingerprint((file, folder / file) for file in FILES)}
