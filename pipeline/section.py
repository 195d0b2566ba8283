"""The strict base class of all sections of an experiment, and field types that several sections use."""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

COMMIT = re.compile(r"[0-9a-f]{40}")
"""A commit of a Hub repository; unlike a branch, it never moves."""

Dtype = Literal["bfloat16", "float32"]
Seed = Annotated[int, Field(ge=0)]
"""Seed of a random generator; numpy accepts no negative one."""
Fraction = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """One table of the TOML file: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def needs_commit(repository: str, given: str | None) -> str:
    """The message for a Hub repository that is declared without a commit."""
    return (
        f"needs `revision`, the 40 hexadecimal digits of a commit, not {given!r}; "
        f"https://huggingface.co/{repository}/commits/main lists them"
    )
