"""How the rows of a store may be compressed. Imports neither zarr nor torch, so that an experiment is read at once."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator


def _blosc(itemsize: int) -> list[dict[str, Any]]:
    options = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "typesize": itemsize, "blocksize": 524288}
    return [{"name": "blosc", "configuration": options}]


CODECS: dict[str, Callable[[int], list[dict[str, Any]]]] = {"raw": lambda _itemsize: [], "blosc": _blosc}
"""The values of `store.codec`: given the bytes of a value, Zarr's codecs as zarr.json names them. A checksum follows them.

`pipeline.store.direct` reads blosc and zstd itself; what it does not know, zarr-python reads, several times slower.
"""


def _known(name: str) -> str:
    if name not in CODECS:
        raise ValueError(f"should be one of {', '.join(map(repr, CODECS))}, got {name!r}")
    return name


Codec = Annotated[str, AfterValidator(_known)]
