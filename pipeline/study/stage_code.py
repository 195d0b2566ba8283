"""Names functions and classes of the stages in tables of the study, which must import neither the stages nor torch."""

from collections.abc import Callable
from pkgutil import resolve_name
from typing import Any

StageCode = str | Callable[..., Any]
"""A function or class, or its name as "module:name". A script that adds to a table may give the object itself."""


def imported(code: StageCode) -> Callable[..., Any]:
    """The function or class, imported now if it is given by name."""
    return resolve_name(code) if isinstance(code, str) else code
