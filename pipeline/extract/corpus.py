"""Text to tokens: documents packed into sequences of one length, and labelled texts padded to one.

Shapes: S sequences, L tokens per sequence.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from pipeline.errors import BadInputError
from pipeline.experiment import PythonCorpus, TextCorpus
from pipeline.extract import python_text
from pipeline.progress import progress
from pipeline.store.format import Sequences

TEXTS_PER_CALL = 256


def texts(corpus: TextCorpus) -> Iterator[str]:
    """The corpus's documents, in a fixed order."""
    if isinstance(corpus, PythonCorpus):
        yield from python_text.corpus_texts()
        return
    from datasets import load_dataset

    try:
        rows: Any = load_dataset(corpus.name, revision=corpus.revision, split=corpus.split, streaming=True)
        for row in rows:
            yield row[corpus.text_column]
    except KeyError:
        raise BadInputError(f"corpus.text_column: {corpus.name} has no column {corpus.text_column!r}") from None
    except (OSError, ValueError) as error:
        raise BadInputError(f"corpus {corpus.name} cannot be read: {' '.join(str(error).split())}") from None


def pack(documents: Iterable[str], tokenizer: Any, *, context: int, rows: int) -> Sequences:
    """Pack documents into sequences of `context` tokens until they hold `rows` tokens of text, or the documents end.

    Every sequence starts with a BOS, and a BOS stands before every document that starts inside one: that is what the model
    saw in training. A document goes on into the next sequence; the last, incomplete sequence is dropped.
    Raises BadInputError for a corpus without text or shorter than one sequence.
    """
    bos = tokenizer.bos_token_id
    special = set(tokenizer.all_special_ids)
    sequences: list[list[int]] = []
    doc_starts: list[int] = []
    current = [bos]
    done = documents_seen = 0
    with progress("tokens", rows, "tokens") as advance:
        for ids in _encoded(documents, tokenizer):
            documents_seen += 1
            waiting = [bos, *ids] if len(current) > 1 else ids
            start = len(sequences) * context + len(current) + len(waiting) - len(ids)
            # Where the BOS fills a sequence, the document starts behind the BOS of the next one.
            doc_starts.append(start + 1 if start % context == 0 else start)
            while waiting:
                room = context - len(current)
                current, waiting = current + waiting[:room], waiting[room:]
                if len(current) == context:
                    text_tokens = sum(token not in special for token in current)
                    done += text_tokens
                    advance(text_tokens)
                    sequences.append(current)
                    current = [bos]
            if done >= rows:
                break
    if not documents_seen:
        raise BadInputError("the corpus holds no text")
    if not sequences:
        raise BadInputError(f"the corpus has {len(current) - 1} tokens, which is less than one context of {context}")
    tokens_SL = np.array(sequences, dtype=np.int32)
    # A document that begins in the dropped sequence has no token in the store.
    starts = np.array([start for start in doc_starts if start < tokens_SL.size], dtype=np.int64)
    return Sequences(tokens_SL=tokens_SL, row_offsets=row_offsets(tokens_SL, sorted(special)), doc_starts=starts)


def _encoded(documents: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    remaining = iter(documents)
    while group := list(islice(remaining, TEXTS_PER_CALL)):
        yield from (ids for ids in tokenizer(group, add_special_tokens=False)["input_ids"] if ids)


def pad(documents: Sequence[str], tokenizer: Any, *, context: int) -> Sequences:
    """One sequence per text: BOS, at most `context` - 1 tokens, padding on the right.

    Raises BadInputError for a text without a token: its mean activation would be NaN.
    """
    bos, pad_id = tokenizer.bos_token_id, tokenizer.pad_token_id
    tokens_SL = np.full((len(documents), context), pad_id, dtype=np.int32)
    for index, ids in enumerate(tokenizer(list(documents), add_special_tokens=False)["input_ids"]):
        kept = [bos, *ids[: context - 1]]
        tokens_SL[index, : len(kept)] = kept
    offsets = row_offsets(tokens_SL, padding_ids(tokenizer))
    for index in np.flatnonzero(np.diff(offsets) == 0):
        raise BadInputError(f"text {index} has no tokens: {documents[index]!r}")
    return Sequences(
        tokens_SL=tokens_SL, row_offsets=offsets, doc_starts=np.arange(len(documents), dtype=np.int64) * context
    )


def padding_ids(tokenizer: Any) -> list[int]:
    """The ids that sae-bench leaves out of a probe's mean: BOS, EOS and padding."""
    return sorted({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id})


def row_offsets(tokens_SL: np.ndarray, special_ids: Iterable[int]) -> np.ndarray:
    """int64 [S + 1]: how many rows come before each sequence, a row being a token that is not special."""
    counts = (~np.isin(tokens_SL, list(special_ids))).sum(axis=1)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
