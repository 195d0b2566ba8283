"""Reading a store: committed shards only, every file checked when the store is opened, every chunk when it is read.

Shapes: R rows, D d_in.
"""

import math
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from pydantic import ValidationError

from pipeline.errors import CorruptArtefactError
from pipeline.store import format as fmt
from pipeline.store.writer import Commit, commit_path


class ActivationStore:
    """A finished activation store.

    Raises CorruptArtefactError on opening when a shard is not committed or one of its files is missing or has another size,
    and on reading when a checksum does not match.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.group, self.layout = fmt.open_group(folder, mode="r")
        self.commits = [self._checked_commit(shard) for shard in range(self.layout.shards)]

    def _checked_commit(self, shard: int) -> Commit:
        path = commit_path(self.folder, shard)
        try:
            commit = Commit.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise CorruptArtefactError(f"{self.folder}: shard {shard} was never committed; extract again") from None
        except ValidationError:
            raise CorruptArtefactError(f"{path} cannot be read; delete it and extract again") from None
        for name, check in commit.files.items():
            file = self.folder / name
            size = file.stat().st_size if file.is_file() else None
            if size != check.bytes:
                found = "is missing" if size is None else f"has {size} bytes instead of {check.bytes}"
                raise CorruptArtefactError(f"{file} {found}; delete {path} and extract again")
        return commit

    @property
    def rows(self) -> int:
        """Rows of real data."""
        return self.layout.rows

    @cached_property
    def bytes(self) -> int:
        """Bytes of all committed files."""
        return sum(check.bytes for commit in self.commits for check in commit.files.values())

    def scale(self, layer: int) -> float:
        """The factor that makes E||x||^2 = 1 over the store (docs/method.md, "The loss")."""
        return math.sqrt(self.rows / sum(commit.sum_squares[layer] for commit in self.commits))

    def read(self, layer: int, start: int, stop: int) -> torch.Tensor:
        """Rows `start` to `stop` of a layer, [R, D] in the store's dtype."""
        bits = fmt.BITS[self.layout.dtype]
        values = np.asarray(self._read(fmt.layer_array(layer), start, stop))
        return torch.from_numpy(values).view(bits.torch_dtype)

    def read_field(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows `start` to `stop` of one of ROW_FIELDS, [R]."""
        return np.asarray(self._read(name, start, stop))

    def whole(self, name: str) -> np.ndarray:
        """All of one of the arrays that have an entry per sequence or per document."""
        return np.asarray(self._read(name, None, None))

    def _read(self, name: str, start: int | None, stop: int | None) -> np.ndarray:
        try:
            return fmt.array(self.group, name)[start:stop]  # pyright: ignore[reportReturnType]
        except (ValueError, RuntimeError) as error:  # what zarr's codecs raise for a bad checksum or a torn index
            raise CorruptArtefactError(f"{self.folder / name}: rows {start} to {stop} cannot be read: {error}") from error
