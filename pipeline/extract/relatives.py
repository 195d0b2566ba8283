"""Takes over shards, whole or layer by layer, that other stores of the workspace have already.

A store that grows costs what is new, and files that stores share take no space (`pipeline.study.related`).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt

from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.storage import Storage
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import CorruptArtefactError
from pipeline.extract.shards import row_fields
from pipeline.store import format as fmt
from pipeline.store.commits import Commit, commit_name, read_commit
from pipeline.store.direct import ShardedArray, is_committed
from pipeline.store.writer import InPlace
from pipeline.study.related import related_stores


class Relatives:
    """The stores of a workspace that are related to one of it. False if there is none."""

    def __init__(self, artefact: Artefact, workspace: Workspace, layout: fmt.Layout):
        self.layout = layout
        self.stores = [_Relative(storage, other) for storage, other in related_stores(artefact, workspace, layout)]

    def __bool__(self) -> bool:
        return bool(self.stores)

    def remarks(self, heldout_within: int | None) -> Iterator[str]:
        """What is taken over, and a warning if rows that a smaller store held out are trained on."""
        for store in self.stores:
            if layers := store.layers_of(self.layout):
                yield f"taking over what {store.storage} has of layers {', '.join(map(str, layers))}"
        smaller = [store.layout.rows for store in self.stores if store.layout.rows < self.layout.rows]
        if smaller and heldout_within is None and not self.layout.classes:
            yield (
                f"what studies of the smaller store held out is trained on here; train.heldout_within = {max(smaller)} "
                f"holds out the same shards again"
            )

    def take_over(self, shard: int, passage: fmt.Passage, into: Storage) -> tuple[fmt.RowFields, dict[int, InPlace]]:
        """Put the files of a shard's layers that a relative has in place, after comparing their checksums.

        `passage` has the shard's sequences: what a relative made of other tokens is not taken. Returns which token each row
        belongs to, without massive rows, and the layers whose files are in place.
        """
        fields = row_fields(shard, self.layout, passage)
        there: dict[int, InPlace] = {}
        rows = fields
        for store in self.stores:
            layers = [layer for layer in store.layers_of(self.layout) if layer not in there]
            if not layers or not (commit := store.commit(shard, self.layout)) or not store.reads(passage, shard):
                continue
            kept_R = _same_rows(fields, store.fields(commit), some=self.layout.max_norm is not None)
            if kept_R is None:
                continue
            rows = fields.kept(kept_R)
            for layer in layers:
                if store.give(fmt.layer_file(layer, shard), commit, into):
                    there[layer] = InPlace(commit.files[fmt.layer_file(layer, shard)], commit.norms[layer])
        if self.layout.max_norm is not None and len(there) < len(self.layout.layers):
            return fields, {}  # which rows stay depends on all layers together
        return rows, there


@dataclass(frozen=True)
class _Relative:
    """A store that is related to another one, finished or not. Its commits say what it has."""

    storage: Storage
    layout: fmt.Layout
    arrays: dict[str, ShardedArray | None] = field(default_factory=dict[str, ShardedArray | None])

    def layers_of(self, layout: fmt.Layout) -> list[int]:
        return [layer for layer in layout.layers if layer in self.layout.layers]

    def commit(self, shard: int, layout: fmt.Layout) -> Commit | None:
        """The record of a shard that has the same range in both stores, unlike the last one of a shorter store."""
        if self.layout.shard_range(shard) != layout.shard_range(shard):
            return None
        try:
            commit = read_commit(self.storage.read(commit_name(shard), fmt.LARGEST_METADATA), shard, self.layout)
        except (FileNotFoundError, ValueError, CorruptArtefactError):
            return None
        # Records of earlier versions cannot tell one file from another.
        return commit if all(check.chunks for check in commit.files.values()) else None

    def reads(self, passage: fmt.Passage, shard: int) -> bool:
        """Whether the model read the same sequences for a shard."""
        try:
            own = self._text.passage(*self.layout.shard_range(shard))
        except CorruptArtefactError:
            return False
        return own.first == passage.first and np.array_equal(own.tokens_SL, passage.tokens_SL)

    @cached_property
    def _text(self) -> fmt.StoredSequences:
        return fmt.StoredSequences(self.storage)

    def fields(self, commit: Commit) -> fmt.RowFields | None:
        """Which token each row of a shard belongs to, None where that cannot be read."""
        start, _ = self.layout.shard_range(commit.shard)
        values: dict[str, fmt.Integers] = {}
        for name, dtype in fmt.ROW_FIELDS.items():
            values[name] = np.empty(commit.rows, dtype)
            try:
                if name not in self.arrays:
                    self.arrays[name] = ShardedArray.open(self.storage, name)
                array = self.arrays[name]
                if not array or not array.fits(self.layout, layer=False):
                    return None
                array.read(start, values[name], commit.files[array.file(commit.shard)])
            except CorruptArtefactError:
                return None
        return fmt.RowFields(**values)

    def give(self, file: str, commit: Commit, into: Storage) -> bool:
        """Give the other store a file under the same name; False where it is gone or damaged."""
        try:
            content = self.storage.read(file)
            if not is_committed(content, commit.files[file], self.layout.shard_rows // self.layout.chunk_rows):
                return False
            if not into.share(file, self.storage, file):
                into.write(file, content)
        except FileNotFoundError:
            return False
        return True


def _same_rows(fields: fmt.RowFields, stored: fmt.RowFields | None, *, some: bool) -> npt.NDArray[np.bool_] | None:
    """Which of the rows are stored; None unless these are the same, all of them or, with `some`, those that were kept."""
    if stored is None:
        return None
    kept_R = np.isin(_place(fields), _place(stored))
    if not (some or kept_R.all()):
        return None
    kept = fields.kept(kept_R)
    same = all(np.array_equal(getattr(kept, name), getattr(stored, name)) for name in fmt.ROW_FIELDS)
    return kept_R if same else None


def _place(fields: fmt.RowFields) -> npt.NDArray[np.int64]:
    return fields.sequence.astype(np.int64) * 2**32 + fields.position
