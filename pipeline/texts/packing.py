"""Turns texts into token sequences of one length: packs the documents of a corpus, pads labelled texts."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field

from pipeline.errors import BadInputError
from pipeline.runtime.progress import progress
from pipeline.store.format import Sequences

TEXTS_PER_CALL = 256
CHARACTERS_PER_CALL = 1_000_000
"""Bounds the memory of one call: a tokenizer returns Python integers, which take ten times the memory of the text."""


def pack(documents: Iterable[str], tokenizer: Any, *, context: int, rows: int) -> Sequences:
    """Pack documents into sequences of `context` tokens until they hold `rows` tokens of text, or the documents end.

    A BOS begins every sequence, and another one stands before every document that begins inside it, as in the model's
    training. `separator_id` stands in for a missing BOS. A document continues in the next sequence; the last, incomplete
    sequence is dropped. Takes four bytes of memory per token and eight per document. Raises BadInputError for a corpus
    without text or shorter than one sequence.
    """
    packer = Packer(tokenizer, context)
    tokens, counts, doc_starts = array("i"), array("q"), array("q")
    with progress("tokens", rows, "tokens") as advance:
        for ids in _encoded(documents, tokenizer):
            new = packer.add(ids)
            tokens.frombytes(new.tokens_SL.tobytes())
            counts.frombytes(new.rows_S.tobytes())
            doc_starts.frombytes(new.doc_starts.tobytes())
            advance(int(new.rows_S.sum()))
            if packer.rows >= rows:
                break
    packer.check()
    return Sequences(
        tokens_SL=np.frombuffer(tokens, dtype=np.int32).reshape(-1, context),
        row_offsets=_row_offsets(np.frombuffer(counts, dtype=np.int64)),
        doc_starts=np.frombuffer(doc_starts, dtype=np.int64),
    )


class Packed(BaseModel):
    """How far a packing has come: all that is needed to go on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tail: tuple[int, ...]
    """Tokens after the last complete sequence, from its separator on."""
    waiting: tuple[int, ...]
    """Where documents start that begin in the tail."""
    sequences: Annotated[int, Field(ge=0)]
    rows: Annotated[int, Field(ge=0)]


@dataclass(frozen=True, kw_only=True)
class NewSequences:
    """The sequences that one document completed: none, one, or many."""

    tokens_SL: npt.NDArray[np.int32]
    rows_S: npt.NDArray[np.int64]
    """Rows of each sequence."""
    doc_starts: npt.NDArray[np.int64]
    """Where documents start that begin in these sequences, or before them in an incomplete one."""


class Packer:
    """Packs one document after the other, as `pack` says.

    Raises BadInputError for a tokenizer without BOS and EOS.
    """

    def __init__(self, tokenizer: Any, context: int, place: Packed | None = None):
        self.separator, self.special = separator_id(tokenizer), special_ids(tokenizer)
        self.context = context
        self.sequences, self.rows = (place.sequences, place.rows) if place else (0, 0)
        """Complete so far."""
        self._tail = array("i", place.tail if place else [self.separator])
        self._waiting = list(place.waiting) if place else []

    @property
    def place(self) -> Packed:
        """How far it has come."""
        return Packed(tail=tuple(self._tail), waiting=tuple(self._waiting), sequences=self.sequences, rows=self.rows)

    def add(self, ids: list[int]) -> NewSequences:
        """Append the tokens of a document, which must have some; returns the sequences that are complete now."""
        tail, context = self._tail, self.context
        if len(tail) > 1:
            _append([self.separator], tail, context, self.separator)
        starts = [*self._waiting, self.sequences * context + len(tail)]
        _append(ids, tail, context, self.separator)
        complete = len(tail) // context * context
        tokens_SL = np.array(tail[:complete], dtype=np.int32).reshape(-1, context)
        del tail[:complete]
        rows_S = _count_rows(tokens_SL, self.special)
        self.sequences += len(tokens_SL)
        self.rows += int(rows_S.sum())
        # A document that begins in a sequence that never completes has no token in the store.
        inside = sum(start < self.sequences * context for start in starts)
        self._waiting = starts[inside:]
        return NewSequences(tokens_SL=tokens_SL, rows_S=rows_S, doc_starts=np.array(starts[:inside], dtype=np.int64))

    def check(self) -> None:
        """Raise BadInputError for a corpus without text or shorter than one sequence."""
        if not self.sequences and not self._waiting:
            raise BadInputError("the corpus holds no text: name other files, or another text_column")
        if not self.sequences:
            raise BadInputError(
                f"the corpus has {len(self._tail) - 1} tokens, which is less than one context of {self.context}: "
                f"give more text"
            )


def _append(ids: list[int], packed: "array[int]", context: int, separator: int) -> None:
    """Append tokens; whenever a sequence is full, append the separator that begins the next one."""
    taken = 0
    while taken < len(ids):
        room = context - len(packed) % context
        packed.extend(ids[taken : taken + room])
        taken += room
        if len(packed) % context == 0:
            packed.append(separator)


def _encoded(documents: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of every document that has any tokens."""
    for group in groups(documents):
        yield from (ids for ids in encode(group, tokenizer) if ids)


def encode(texts: list[str], tokenizer: Any) -> list[list[int]]:
    """The token ids of texts, without special tokens but those that a text names."""
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def groups(documents: Iterable[str]) -> Iterator[list[str]]:
    """Documents in groups that a tokenizer takes in one call. A group is read when it is asked for."""
    group: list[str] = []
    characters = 0
    for text in documents:
        group.append(text)
        characters += len(text)
        if len(group) == TEXTS_PER_CALL or characters >= CHARACTERS_PER_CALL:
            yield group
            group, characters = [], 0
    if group:
        yield group


class NoTokensError(BadInputError):
    """A text of which the tokenizer makes no token that becomes a row. `index` is its number."""

    def __init__(self, index: int):
        super().__init__(f"text {index} has no tokens")
        self.index = index


def pad(documents: Sequence[str], tokenizer: Any, *, context: int, special_ids: Sequence[int]) -> Sequences:
    """One sequence per text: BOS (`separator_id`), at most `context` - 1 tokens, padding on the right.

    Tokens of `special_ids` do not become rows. EOS serves as padding if the tokenizer has no padding token (GPT-2, Llama).
    Raises NoTokensError for a text without tokens, because its mean activation would be NaN.
    """
    separator = separator_id(tokenizer)
    padding = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, separator) if token is not None)
    tokens_SL = np.full((len(documents), context), padding, dtype=np.int32)
    for index, ids in enumerate(tokenizer(list(documents), add_special_tokens=False)["input_ids"]):
        kept = [separator, *ids[: context - 1]]
        tokens_SL[index, : len(kept)] = kept
    counts = _count_rows(tokens_SL, special_ids)
    for index in np.flatnonzero(counts == 0):
        raise NoTokensError(index)
    doc_starts = np.arange(len(documents), dtype=np.int64) * context
    return Sequences(tokens_SL=tokens_SL, row_offsets=_row_offsets(counts), doc_starts=doc_starts)


def separator_id(tokenizer: Any) -> int:
    """The token that stands before every text: BOS, or EOS for a tokenizer without BOS (Qwen).

    Raises BadInputError for a tokenizer with neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise BadInputError("the model's tokenizer has neither a BOS nor an EOS token, one of which must stand before a text")


def special_ids(tokenizer: Any) -> list[int]:
    """The ids of all special tokens, none of which becomes a row of an activation store."""
    return sorted(set(tokenizer.all_special_ids))


def padding_ids(tokenizer: Any) -> list[int]:
    """The ids that sae-bench leaves out of a probe's mean: BOS, EOS and padding, as far as the tokenizer has them."""
    ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    return sorted(token for token in ids if token is not None)


def _count_rows(tokens_SL: npt.NDArray[np.int32], special_ids: Sequence[int]) -> npt.NDArray[np.int64]:
    """Rows of each sequence [S]: its tokens that are not special."""
    return (~np.isin(tokens_SL, special_ids)).sum(axis=1, dtype=np.int64)


def _row_offsets(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Rows before each sequence, and of all sequences: [S + 1]."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
