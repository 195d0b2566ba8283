"""Turns texts into token sequences of one length: packs the documents of a corpus, pads labelled texts."""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

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
    separator, special = separator_id(tokenizer), special_ids(tokenizer)
    packed = array("i", [separator])
    doc_starts, row_counts = array("q"), array("q")
    done = 0
    with progress("tokens", rows, "tokens") as advance:
        for ids in _encoded(documents, tokenizer):
            if len(packed) % context > 1:
                _append([separator], packed, context, separator)
            doc_starts.append(len(packed))
            _append(ids, packed, context, separator)
            complete = packed[len(row_counts) * context : len(packed) // context * context]
            counts = _count_rows(np.array(complete, dtype=np.int32).reshape(-1, context), special)
            row_counts.extend(counts.tolist())
            advance(int(counts.sum()))
            done += int(counts.sum())
            if done >= rows:
                break
    if not doc_starts:
        raise BadInputError("the corpus holds no text: name other files, or another text_column")
    if not row_counts:
        raise BadInputError(
            f"the corpus has {len(packed) - 1} tokens, which is less than one context of {context}: give more text"
        )
    tokens_SL = np.frombuffer(packed, dtype=np.int32, count=len(row_counts) * context).reshape(-1, context)
    # A document that begins in the dropped sequence has no token in the store.
    starts = np.array(doc_starts, dtype=np.int64)
    starts = starts[starts < tokens_SL.size]
    return Sequences(tokens_SL=tokens_SL, row_offsets=_row_offsets(np.array(row_counts)), doc_starts=starts)


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
    for group in _groups(documents):
        yield from (ids for ids in tokenizer(group, add_special_tokens=False)["input_ids"] if ids)


def _groups(documents: Iterable[str]) -> Iterator[list[str]]:
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
