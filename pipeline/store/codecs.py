"""The table of codecs of a store's rows. Imports neither zarr nor torch: an experiment must be validated without them."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator

from pipeline.section import one_of


def _blosc(itemsize: int) -> list[dict[str, Any]]:
    options = {"cname": "zstd", "clevel": 1, "shuffle": "shuffle", "typesize": itemsize, "blocksize": 524288}
    return [{"name": "blosc", "configuration": options}]


CODECS: dict[str, Callable[[int], list[dict[str, Any]]]] = {"raw": lambda _itemsize: [], "blosc": _blosc}
"""Zarr's codecs, as zarr.json writes them, for each value of `store.codec`, given the bytes per number.

`pipeline.store.direct` reads blosc and zstd; zarr-python reads any other codec, several times slower.
"""


Codec = Annotated[str, AfterValidator(one_of(CODECS))]
