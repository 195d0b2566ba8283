"""Defines the base class of all sections of an experiment, field types they share, and which fields are hashed."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field

COMMIT = re.compile(r"[0-9a-f]{40}")
"""A commit of a Hub repository; unlike a branch, it never moves."""

Dtype = Literal["bfloat16", "float32"]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""Seed of a random generator; numpy accepts no negative one, torch none beyond."""
PositiveInt = Annotated[int, Field(gt=0, le=2**40)]
"""A number of rows, steps, latents or the like. Nobody has more than the bound, and counting up to it takes days."""
Fraction = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class Before:
    """Marks a field that was added later: `activation: Annotated[str, Before("relu")] = "relu"`.

    `value` says how the code behaved before the field existed. A field at that value is left out of the hashed inputs, so
    existing artefacts keep their keys. When the default changes, `value` must not.
    """

    value: Any


class Section(BaseModel):
    """One table of the TOML file: frozen, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    def canonical(self, *, only: Collection[str] | None = None, without: Collection[str] = ()) -> dict[str, Any]:
        """The fields that determine an artefact's bytes, as plain data: all, `only` some, or all `without` some.

        Fields at their `Before` value are left out, in nested sections too.
        """
        return {
            name: _plain(getattr(self, name))
            for name, field in type(self).model_fields.items()
            if (only is None or name in only) and name not in without and Before(getattr(self, name)) not in field.metadata
        }


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.canonical()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast("list[Any]", value)]
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in cast("Mapping[str, Any]", value).items()}
    return value


def one_of(table: Mapping[str, Any]) -> Callable[[str], str]:
    """A validator of names: it raises ValueError for a name that is not in the table when it is called."""

    def known(name: str) -> str:
        if name not in table:
            raise ValueError(f"should be one of {', '.join(map(repr, table))}, got {name!r}")
        return name

    return known


def needs_commit(repository: str, given: str | None) -> str:
    """The end of the message for a Hub repository that is declared without a commit."""
    return (
        f"needs `revision`, the 40 hexadecimal digits of a commit, not {given!r}; "
        f"https://huggingface.co/{repository}/commits/main lists them"
    )
