"""Defines the layout of an activation store on disk and creates empty stores. docs/store-format.md is the specification."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, cast

import numpy as np
import numpy.typing as npt
import torch
import zarr
from pydantic import BaseModel, ConfigDict, Field, model_validator
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.core.buffer import Buffer
from zarr.storage import MemoryStore

from pipeline.artefacts.identity import SEAL, is_sealed, sealed
from pipeline.artefacts.storage import Storage
from pipeline.errors import CorruptArtefactError
from pipeline.section import Dtype
from pipeline.store.codecs import CODECS, Codec
from pipeline.store.limits import MOST_SHARDS
from pipeline.store.text_arrays import UNREADABLE, GrowingArray, StoredArray, read_whole

MOST_SPECIAL_IDS, MOST_LAYERS = 2**16, 2**12
MOST_NUMBER = 2**40
"""Bounds on what a store may say of itself, far above any real store: nobody counts to 1e15 because a file says so."""
LARGEST_METADATA = 2**24
"""Bytes of a zarr.json, which is parsed whole; a real one has some thousands."""

Number = Annotated[int, Field(ge=1, le=MOST_NUMBER)]
Integers = npt.NDArray[np.integer[Any]]

FORMAT = "dasae-activations/2"
COMMITS = "commits"
ROOT = "zarr.json"
TEXT_FILES = "text_files"
"""Attribute of the root that holds the hashes of the `text_arrays`' files."""
RowField = Literal["doc_id", "sequence", "position", "token_id"]
ROW_FIELDS: dict[RowField, str] = {"doc_id": "int64", "sequence": "int32", "position": "int32", "token_id": "int32"}
"""Arrays that say which token each row belongs to, in the row order of the layers, and their dtypes on disk."""


@dataclass(frozen=True)
class Bits:
    """How a floating-point dtype is stored: as bit patterns in unsigned integers, because Zarr 3.1 has no bfloat16."""

    torch_dtype: torch.dtype
    view: torch.dtype
    name: str
    fill: int
    """All ones, which is a NaN in both dtypes: a row that was never written reads as NaN."""

    def patterns(self, rows_RD: torch.Tensor) -> Integers:
        """The bit patterns of contiguous rows on the CPU, in the same memory."""
        return cast("Integers", rows_RD.view(self.view).numpy())


BITS: dict[Dtype, Bits] = {
    "bfloat16": Bits(torch.bfloat16, torch.uint16, "uint16", 0xFFFF),
    "float32": Bits(torch.float32, torch.uint32, "uint32", 0xFFFFFFFF),
}


class Layout(BaseModel):
    """The attributes of a store's root group, which are all that a reader needs to know."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["dasae-activations/2"] = FORMAT
    rows: Number
    """Rows of all shards together; arrays are padded to whole shards."""
    shard_rows: Number
    chunk_rows: Number
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1, max_length=MOST_LAYERS)]
    d_in: Number
    dtype: Dtype
    codec: Codec
    row_order: Literal["shuffled", "document"]
    """`shuffled`: rows are permuted inside each shard. `document`: rows stay in the order of the text (probe stores)."""
    seed: Annotated[int, Field(ge=0)]
    """Seed of the permutations; in a synthetic store, seed of the rows."""
    special_ids: Annotated[tuple[int, ...], Field(max_length=MOST_SPECIAL_IDS)]
    """Token ids that never become rows (BOS, EOS, padding, ...)."""
    max_norm: Annotated[float, Field(gt=1)] | None = None
    """A row is left out if its norm, at any layer, exceeds this multiple of its shard's median norm."""
    provenance: dict[str, Any]
    """Model, corpus and tokenizer this was extracted from."""
    classes: tuple[str, ...] = ()
    """Class names of a probe store, in the order of the label numbers; empty for other stores."""
    kept: tuple[Annotated[int, Field(ge=0)], ...] | None = None
    """The shards that the store of a stream has: the others are made while training. None for a store that has all."""

    @model_validator(mode="after")
    def _whole_chunks(self) -> Self:
        if self.shard_rows % self.chunk_rows or self.shards > MOST_SHARDS:
            raise ValueError(f"{self.shards} shards of {self.shard_rows} rows in chunks of {self.chunk_rows}")
        if self.kept is not None and not set(self.kept) <= set(range(self.shards)):
            raise ValueError(f"keeps others than its {self.shards} shards")
        return self

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.rows // self.shard_rows)

    @property
    def present(self) -> tuple[int, ...]:
        """Numbers of the shards that a finished store has."""
        return tuple(range(self.shards)) if self.kept is None else self.kept

    def shard_range(self, shard: int) -> tuple[int, int]:
        """First row of a shard and one past its last. The shard holds fewer rows where `max_norm` leaves some out."""
        return shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.rows)


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """The tokens of a store, known before any forward pass."""

    tokens_SL: npt.NDArray[np.int32]
    """Each sequence begins with a BOS; padding stands only on the right."""
    row_offsets: npt.NDArray[np.int64]
    """[S + 1]: before shuffling, sequence s owns rows row_offsets[s] to row_offsets[s + 1] - 1."""
    doc_starts: npt.NDArray[np.int64]
    """[documents]: where each document starts in `tokens_SL.ravel()`."""

    @property
    def rows(self) -> int:
        """Rows of all sequences together."""
        return int(self.row_offsets[-1])

    @property
    def context(self) -> int:
        """Tokens of a sequence."""
        return self.tokens_SL.shape[1]

    def passage(self, start: int, stop: int) -> "Passage":
        """The sequences that have the rows `start` to `stop` - 1."""
        first = int(np.searchsorted(self.row_offsets, start, side="right")) - 1
        last = int(np.searchsorted(self.row_offsets, stop, side="left"))
        before = int(np.searchsorted(self.doc_starts, first * self.context, side="right")) - 1
        document = max(0, before)
        return Passage(
            first=first,
            tokens_SL=self.tokens_SL[first:last],
            row_offsets=self.row_offsets[first : last + 1],
            document=document,
            doc_starts=self.doc_starts[document : int(np.searchsorted(self.doc_starts, last * self.context))],
        )


@dataclass(frozen=True, kw_only=True)
class Passage:
    """Neighbouring sequences of a store, and the documents in them."""

    first: int
    """Number of the first sequence."""
    tokens_SL: npt.NDArray[np.int32]
    row_offsets: npt.NDArray[np.int64]
    """[S + 1]: the entries of these sequences in `Sequences.row_offsets`."""
    document: int
    """Number of the first document."""
    doc_starts: npt.NDArray[np.int64]
    """Where these documents start in all tokens; the first may start before the passage."""


class StoredSequences:
    """The tokens of a laid-out store, read where they are needed. Raises CorruptArtefactError."""

    def __init__(self, storage: Storage):
        self._tokens, self._offsets, self._doc_starts = (
            StoredArray(storage, name) for name in ("tokens", "row_offsets", "doc_starts")
        )
        self.context: int = self._tokens.shape[1]
        """Tokens of a sequence."""

    def passage(self, start: int, stop: int) -> Passage:
        """The sequences that have the rows `start` to `stop` - 1."""
        first, last = self._offsets.searchsorted(start, "right") - 1, self._offsets.searchsorted(stop)
        document = max(0, self._doc_starts.searchsorted(first * self.context, "right") - 1)
        return Passage(
            first=first,
            tokens_SL=self._tokens.read(first, last),
            row_offsets=self._offsets.read(first, last + 1),
            document=document,
            doc_starts=self._doc_starts.read(document, self._doc_starts.searchsorted(last * self.context)),
        )


@dataclass(frozen=True, kw_only=True)
class Labels:
    """Class and split of each document of a probe store, [S] because each document is one sequence."""

    label: npt.NDArray[np.int32]
    """Index into `Layout.classes`."""
    split: npt.NDArray[np.uint8]
    """0 for training, 1 for testing."""


@dataclass(frozen=True, kw_only=True)
class NewStore:
    """What an empty store consists of: everything that is known before the first forward pass."""

    layout: Layout
    sequences: Sequences
    labels: Labels | None = None
    """Only for a probe store."""


@dataclass(frozen=True, kw_only=True)
class RowFields:
    """Which token each row of a shard belongs to: one integer array [R] per name in ROW_FIELDS."""

    doc_id: Integers
    sequence: Integers
    position: Integers
    token_id: Integers

    def kept(self, kept_R: npt.NDArray[np.bool_]) -> "RowFields":
        """Only the rows that a bool [R] names."""
        arrays: dict[str, Integers] = vars(self)
        return RowFields(**{name: values[kept_R] for name, values in arrays.items()})


@dataclass(frozen=True, kw_only=True)
class ShardRows:
    """All rows of one shard, in the order in which they are stored."""

    layers: dict[int, torch.Tensor]
    """The rows [R, D] of each layer, in the store's dtype, on the CPU."""
    fields: RowFields

    def kept(self, kept_R: torch.Tensor) -> "ShardRows":
        """Only the rows that a bool [R] names."""
        layers = {layer: rows_RD[kept_R] for layer, rows_RD in self.layers.items()}
        return ShardRows(layers=layers, fields=self.fields.kept(cast("npt.NDArray[np.bool_]", kept_R.numpy())))


def layer_array(layer: int) -> str:
    """Name of the array that holds the rows of a layer."""
    return f"layer_{layer:02d}"


def layer_file(layer: int, shard: int) -> str:
    """Path, relative to the store, of the file that holds a shard's rows of a layer."""
    return f"{layer_array(layer)}/c/{shard}/0"


def create(storage: Storage, new: NewStore) -> None:
    """Write an empty store: its metadata and all its tokens. Its shards can then be filled in any order.

    Equal arguments write equal files, so several processes may do this at once.
    """
    text = new.sequences
    whole: dict[str, Integers] = {
        "tokens": text.tokens_SL,
        "row_offsets": text.row_offsets,
        "doc_starts": text.doc_starts,
        **(vars(new.labels) if new.labels else {}),
    }
    hashes: dict[str, str] = {}
    for name, values in whole.items():
        array = GrowingArray(storage, name)
        array.append(values)
        hashes |= array.finish()
    lay_out(storage, new.layout, hashes)


def lay_out(storage: Storage, layout: Layout, text_files: Mapping[str, str]) -> None:
    """Write the metadata of a store whose text is written; `text_files` has the SHA-256 of each file of it.

    The root's `zarr.json` is written last: a folder without it is not laid out yet. Until there is a manifest, nothing else
    says what was written here.
    """
    files = skeleton(layout, dict(sorted(text_files.items())))[1]
    for name in sorted(files, key=lambda name: (name == ROOT, name)):
        storage.write(name, files[name].as_numpy_array().data)


def skeleton(layout: Layout, text_files: Mapping[str, str] | None = None) -> tuple[zarr.Group, dict[str, Buffer]]:
    """The group and row arrays of an empty store in memory, and the files behind them, which writing to the group fills.

    `text_files` are the hashes that the root holds (`read_root`).
    """
    files: dict[str, Buffer] = {}
    # Stores of earlier versions have no `kept`, and their files stay as they are.
    attributes = layout.model_dump(mode="json", exclude={"kept"} if layout.kept is None else None)
    if text_files:
        attributes = sealed({**attributes, TEXT_FILES: dict(text_files)})
    group = zarr.open_group(MemoryStore(files), mode="w", zarr_format=3, attributes=attributes)
    bits = BITS[layout.dtype]
    padded = layout.shards * layout.shard_rows
    # crc32c comes last, so that reading finds a flipped bit before it decompresses.
    compressors: list[dict[str, Any]] = [*CODECS[layout.codec](bits.torch_dtype.itemsize), {"name": "crc32c"}]
    for layer in layout.layers:
        group.create_array(
            layer_array(layer),
            shape=(padded, layout.d_in),
            chunks=(layout.chunk_rows, layout.d_in),
            shards=(layout.shard_rows, layout.d_in),
            dtype=bits.name,
            fill_value=bits.fill,
            compressors=compressors,
            attributes={"logical_dtype": layout.dtype},
        )
    for name, dtype in ROW_FIELDS.items():
        group.create_array(
            name,
            shape=(padded,),
            chunks=(layout.chunk_rows,),
            shards=(layout.shard_rows,),
            dtype=dtype,
            fill_value=-1,
            compressors=[ZstdCodec(level=1), Crc32cCodec()],
        )
    return group, files


def read_sequences(storage: Storage) -> Sequences:
    """The tokens of a laid-out store, all of them. Raises CorruptArtefactError."""
    return Sequences(
        tokens_SL=read_whole(storage, "tokens"),
        row_offsets=read_whole(storage, "row_offsets"),
        doc_starts=read_whole(storage, "doc_starts"),
    )


def is_laid_out(storage: Storage) -> bool:
    """Whether `create` has finished here."""
    return storage.size(ROOT) is not None


def read_layout(storage: Storage) -> Layout:
    """The layout of a store. Raises what `read_root` does."""
    return read_root(storage)[0]


def read_root(storage: Storage) -> tuple[Layout, dict[str, str]]:
    """The layout of a store, and SHA-256 by name of the files of its `text_arrays`: {} in stores of earlier versions.

    Raises CorruptArtefactError when there is no store of this format, or its layout was changed.
    """
    try:
        if not 0 < (storage.size(ROOT) or 0) <= LARGEST_METADATA:
            raise ValueError("it is missing, empty or too large")
        record: dict[str, Any] = dict(json.loads(storage.read(ROOT))["attributes"])
        if not is_sealed(record):
            raise ValueError("it was changed after it was written")
        fields = {name: value for name, value in record.items() if name not in (SEAL, TEXT_FILES)}
        return Layout.model_validate(fields), dict(record.get(TEXT_FILES, {}))
    except UNREADABLE:
        raise CorruptArtefactError(
            f"{storage} is not an activation store of format {FORMAT}: its {ROOT} is missing, damaged or of another format"
        ) from None


def text_arrays(layout: Layout) -> list[str]:
    """Names of the arrays that `create` writes: tokens and documents, no rows."""
    return ["tokens", "row_offsets", "doc_starts", *(("label", "split") if layout.classes else ())]


def shard_files(layout: Layout, shard: int) -> list[str]:
    """Paths, relative to the store, of the files of one shard."""
    return [layer_file(layer, shard) for layer in layout.layers] + [f"{name}/c/{shard}" for name in ROW_FIELDS]
