"""Writes the text of a new activation store while it is packed: in constant memory, and resumable.

Sequences go to files as soon as they fill a chunk. Every few seconds a record says how far the text has come, so that a
process that was killed goes on there. The last such record stays in the store: a longer store begins where it ends.
"""

import json
import time
from base64 import b64decode, b64encode
from collections.abc import Iterator
from typing import Annotated, Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from pipeline.artefacts.identity import SEAL, canonical_json, is_sealed, sealed, sha256
from pipeline.artefacts.storage import RECORD_BYTES, Storage
from pipeline.errors import CorruptArtefactError
from pipeline.extract.relatives import Relatives
from pipeline.runtime.progress import progress
from pipeline.store import format as fmt
from pipeline.store.text_arrays import ENTRIES, GrowingArray, StoredArray, chunk_file
from pipeline.texts import packing
from pipeline.texts.corpus import Place, documents
from pipeline.texts.text_sections import TextCorpus

END, SO_FAR = "text.json", "text-so-far.json"
"""Where the text of a store ends, for a longer one; and, until the store is laid out, how far it has come."""
SECONDS_BETWEEN_RECORDS = 10.0
DTYPES = {"tokens": "<i4", "row_offsets": "<i8", "doc_starts": "<i8"}
Count = Annotated[int, Field(ge=0)]


class Progress(BaseModel):
    """How far a text has come: what is packed, and where the next document is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    packed: packing.Packed
    place: dict[str, Any]
    """Where the group of documents begins that the last document is in."""
    packed_of_group: Count
    """Documents of the group that are packed."""
    asked: Count
    """Rows at which the text was to end."""
    files: dict[str, str] = {}
    """SHA-256 of every file so far; not in the record of a whole text, whose root has them."""
    rest: dict[str, str] = {}
    """Entries of each array that fill no chunk yet, in base64; not in the record of a whole text either."""

    def record(self) -> bytes:
        """The file's content."""
        return canonical_json(sealed(json.loads(self.model_dump_json(exclude_defaults=True)))).encode()

    @classmethod
    def read(cls, storage: Storage, name: str) -> Self | None:
        """The record, None where there is none that can be believed."""
        try:
            fields = json.loads(storage.read(name, RECORD_BYTES))
            whole = is_sealed(fields)
            return cls.model_validate({key: fields[key] for key in fields if key != SEAL}) if whole else None
        except (FileNotFoundError, ValueError, TypeError, RecursionError, CorruptArtefactError):
            return None


class NewText:
    """The text of a store that is not laid out yet: `rows` rows of it, or all of a shorter corpus.

    It goes on where a killed process or a shorter related store ended, or else begins at the first document.
    """

    def __init__(self, storage: Storage, relatives: Relatives, tokenizer: Any, context: int, rows: int):
        self.storage, self.tokenizer, self.rows = storage, tokenizer, rows
        found = _so_far(storage, context) or _of_a_relative(storage, relatives, rows)
        self.arrays = found[0] if found else {name: GrowingArray(storage, name) for name in DTYPES}
        if not found:
            self.arrays["row_offsets"].append(np.zeros(1, np.int64))
            self.arrays["tokens"].append(np.zeros((0, context), np.int32))
        self.packer = packing.Packer(tokenizer, context, found[1].packed if found else None)
        self.place: Place | None = found[1].place if found else None
        """Where the group of documents begins that the last document is in."""
        self.packed_of_group = found[1].packed_of_group if found else 0

    def pack(self, corpus: TextCorpus) -> Iterator[packing.NewSequences]:
        """Pack documents until they hold all rows; yields what each completes, after it was appended.

        Raises BadInputError for a corpus that cannot be used.
        """
        recorded = time.monotonic()
        with progress("tokens", self.rows, "tokens") as advance:
            advance(self.packer.rows)
            for ids in self._encoded(corpus) if self.packer.rows < self.rows else ():
                new = self.packer.add(ids)
                ends = self.packer.rows - int(new.rows_S.sum()) + np.cumsum(new.rows_S)
                self.arrays["row_offsets"].append(ends)
                self.arrays["doc_starts"].append(new.doc_starts)
                wrote = self.arrays["tokens"].append(new.tokens_SL)
                yield new
                advance(int(new.rows_S.sum()))
                if wrote and time.monotonic() - recorded >= SECONDS_BETWEEN_RECORDS:
                    self._record()
                    recorded = time.monotonic()
                if self.packer.rows >= self.rows:
                    break
        self.packer.check()

    def lay_out(self, layout: fmt.Layout) -> None:
        """Write what is left of the text, and the store's metadata. The store is then laid out."""
        hashes: dict[str, str] = {}
        for array in self.arrays.values():
            hashes |= array.finish()
        end = self._progress().record()
        self.storage.write(END, end)
        # Before the root, so that no store has it: were this process killed now, the text would be packed again.
        self.storage.delete(SO_FAR)
        fmt.lay_out(self.storage, layout, hashes | {END: sha256(end)})

    def _encoded(self, corpus: TextCorpus) -> Iterator[list[int]]:
        """The token ids of every document that has some, after those that are packed."""
        texts, packed = documents(corpus, self.place), self.packed_of_group
        groups = packing.groups(texts)
        while True:
            self.place = texts.place()
            if (group := next(groups, None)) is None:
                return
            for number, ids in enumerate(packing.encode(group, self.tokenizer)[packed:], start=packed + 1):
                self.packed_of_group = number
                if ids:
                    yield ids
            packed = max(0, packed - len(group))
            self.packed_of_group = packed

    def _record(self) -> None:
        files = {file: known for array in self.arrays.values() for file, known in array.files.items()}
        rest = {name: b64encode(array.rest.astype(DTYPES[name]).tobytes()).decode() for name, array in self.arrays.items()}
        self.storage.write(SO_FAR, self._progress(files=files, rest=rest).record())

    def _progress(self, **more: Any) -> Progress:
        return Progress(
            packed=self.packer.place,
            place=dict(self.place or {}),
            packed_of_group=self.packed_of_group,
            asked=self.rows,
            **more,
        )


Found = tuple[dict[str, GrowingArray], Progress]


def _so_far(storage: Storage, context: int) -> Found | None:
    """The text that a killed process has left."""
    if not (so_far := Progress.read(storage, SO_FAR)):
        return None
    arrays: dict[str, GrowingArray] = {}
    for name, dtype in DTYPES.items():
        files = {file: known for file, known in so_far.files.items() if file.startswith(f"{name}/")}
        arrays[name] = GrowingArray(storage, name, length=ENTRIES * len(files), files=files)
        rest = np.frombuffer(b64decode(so_far.rest[name]), dtype)
        arrays[name].append(rest.reshape(-1, context) if name == "tokens" else rest)
    return arrays, so_far


def _of_a_relative(storage: Storage, relatives: Relatives, rows: int) -> Found | None:
    """The text of the longest related store that is not too long, its full chunks shared with it."""
    ended = [(end, store.storage) for store in relatives.stores if (end := Progress.read(store.storage, END))]
    for end, source in sorted(ended, key=lambda found: -found[0].packed.rows):
        if end.asked <= rows and (arrays := _shared(source, storage)):
            return arrays, end
    return None


def _shared(source: Storage, into: Storage) -> dict[str, GrowingArray] | None:
    """The arrays of another store's text, None if a file of it is damaged or gone."""
    arrays: dict[str, GrowingArray] = {}
    try:
        known = fmt.read_root(source)[1]
        if sha256(source.read(END)) != known.get(END):
            return None
        for name in DTYPES:
            stored = StoredArray(source, name)
            full = len(stored) // ENTRIES
            last = [chunk_file(name, full, len(stored.shape))] if len(stored) % ENTRIES else []
            chunks = [chunk_file(name, chunk, len(stored.shape)) for chunk in range(full)]
            for file in (*chunks, *last, f"{name}/{fmt.ROOT}"):
                content = source.read(file)
                if sha256(content) != known.get(file):
                    return None
                if file in chunks and not into.share(file, source, file):
                    into.write(file, content)
            files = {file: known[file] for file in chunks}
            arrays[name] = GrowingArray(into, name, length=full * ENTRIES, files=files)
            arrays[name].append(stored.read(full * ENTRIES, len(stored)))
    except (CorruptArtefactError, FileNotFoundError):
        return None
    return arrays
