"""Text to tokens: documents packed into sequences of one length, and labelled texts padded to one.

Shapes: S sequences, L tokens per sequence.
"""

from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from pipeline.errors import BadInputError
from pipeline.runtime.progress import progress
from pipeline.store.format import Sequences

TEXTS_PER_CALL = 256
CHARACTERS_PER_CALL = 1_000_000
"""A tokenizer's answer is Python integers, ten times the size of the text: this bounds it."""


def pack(documents: Iterable[str], tokenizer: Any, *, context: int, rows: int) -> Sequences:
    """Pack documents into sequences of `context` tokens until they hold `rows` tokens of text, or the documents end.

    Every sequence starts with a BOS, and a BOS stands before every document that starts inside one: that is what the model
    saw in training (`separator_id` where there is no BOS). A document goes on into the next sequence; the last, incomplete
    sequence is dropped. Takes four bytes of memory a token, and eight a document.
    Raises BadInputError for a corpus without text or shorter than one sequence.
    """
    separator, special = separator_id(tokenizer), tokenizer.all_special_ids
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
    """Append tokens, and the separator that begins a sequence whenever one is full."""
    taken = 0
    while taken < len(ids):
        room = context - len(packed) % context
        packed.extend(ids[taken : taken + room])
        taken += room
        if len(packed) % context == 0:
            packed.append(separator)


def _encoded(documents: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of every document that has any."""
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


def pad(documents: Sequence[str], tokenizer: Any, *, context: int, special_ids: Sequence[int]) -> Sequences:
    """One sequence per text: BOS (`separator_id`), at most `context` - 1 tokens, padding on the right.

    Tokens of `special_ids` are no rows.

    Padding is EOS where a tokenizer has no token for it (GPT-2, Llama). Raises BadInputError for a text without a token:
    its mean activation would be NaN.
    """
    separator = separator_id(tokenizer)
    padding = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, separator) if token is not None)
    tokens_SL = np.full((len(documents), context), padding, dtype=np.int32)
    for index, ids in enumerate(tokenizer(list(documents), add_special_tokens=False)["input_ids"]):
        kept = [separator, *ids[: context - 1]]
        tokens_SL[index, : len(kept)] = kept
    counts = _count_rows(tokens_SL, special_ids)
    for index in np.flatnonzero(counts == 0):
        raise BadInputError(f"text {index} has no tokens: {documents[index]!r}")
    doc_starts = np.arange(len(documents), dtype=np.int64) * context
    return Sequences(tokens_SL=tokens_SL, row_offsets=_row_offsets(counts), doc_starts=doc_starts)


def separator_id(tokenizer: Any) -> int:
    """The token that stands before every text: BOS, or EOS for a tokenizer without BOS (Qwen).

    Raises BadInputError for a tokenizer that has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    raise BadInputError("the model's tokenizer has neither a BOS nor an EOS token, one of which must stand before a text")


def padding_ids(tokenizer: Any) -> list[int]:
    """The ids that sae-bench leaves out of a probe's mean: BOS, EOS and padding, those that the tokenizer has."""
    ids = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    return sorted(token for token in ids if token is not None)


def _count_rows(tokens_SL: np.ndarray, special_ids: Sequence[int]) -> np.ndarray:
    """int64 [S]: rows of each sequence, a row being a token that is not special."""
    return (~np.isin(tokens_SL, special_ids)).sum(axis=1, dtype=np.int64)


def _row_offsets(counts: np.ndarray) -> np.ndarray:
    """int64 [S + 1]: how many rows come before each sequence."""
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
