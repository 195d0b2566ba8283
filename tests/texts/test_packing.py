"""From texts to sequences: packing, padding, and what stands between texts for each kind of tokenizer."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import BadInputError
from pipeline.store.format import Sequences
from pipeline.texts import packing

SPECIAL = {"<": 0, "=": 1, ">": 2}


class Letters:
    """A tokenizer of one token per character; ids 0 to 2 are special, and a text may name them."""

    bos_token_id: int | None = 0
    eos_token_id: int | None = 1
    pad_token_id: int | None = 2
    all_special_ids = (0, 1, 2)

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[SPECIAL.get(letter, 3 + ord(letter)) for letter in text] for text in texts]}


class Qwen(Letters):
    """No BOS."""

    bos_token_id = None


class GPT2(Letters):
    """One token for everything special, none for padding."""

    bos_token_id = eos_token_id = 1
    pad_token_id = None
    all_special_ids = (1,)


def plainly_packed(texts: list[str], tokenizer: Letters, context: int, rows: int) -> Sequences | None:
    """Token by token, as the docstring of `packing.pack` says; None where there is not one whole sequence."""
    separator = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    sequences: list[list[int]] = [[separator]]
    doc_starts: list[int] = []

    def put(token: int) -> None:
        sequences[-1].append(token)
        if len(sequences[-1]) == context:
            sequences.append([separator])

    def counts() -> list[int]:
        return [sum(token not in tokenizer.all_special_ids for token in sequence) for sequence in sequences[:-1]]

    for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
        if ids and sum(counts()) < rows:
            if len(sequences[-1]) > 1:
                put(separator)
            doc_starts.append((len(sequences) - 1) * context + len(sequences[-1]))
            for token in ids:
                put(token)
    if len(sequences) == 1:
        return None
    tokens_SL = np.array(sequences[:-1])
    starts = [start for start in doc_starts if start < tokens_SL.size]
    return Sequences(tokens_SL=tokens_SL, row_offsets=np.cumsum([0, *counts()]), doc_starts=np.array(starts))


LETTERS = st.characters(exclude_characters="<=>")
corpora = st.lists(st.text("ab<=>", max_size=30), min_size=1, max_size=20)


@given(corpora, st.sampled_from([Letters(), Qwen(), GPT2()]), st.integers(8, 16), st.integers(1, 200))
def test_packing_does_what_the_plain_twin_does(texts: list[str], tokenizer: Letters, context: int, rows: int) -> None:
    expected = plainly_packed(texts, tokenizer, context, rows)
    if expected is None:
        with pytest.raises(BadInputError, match=r"holds no text|less than one context"):
            packing.pack(texts, tokenizer, context=context, rows=rows)
        return
    packed = packing.pack(iter(texts), tokenizer, context=context, rows=rows)
    for name in ("tokens_SL", "row_offsets", "doc_starts"):
        np.testing.assert_array_equal(getattr(packed, name), getattr(expected, name), err_msg=name)
    assert (packed.tokens_SL.dtype, packed.row_offsets.dtype, packed.doc_starts.dtype) == (np.int32, np.int64, np.int64)


def test_however_texts_are_grouped_the_sequences_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [chr(97 + n % 26) * (n % 40) for n in range(600)]
    whole = packing.pack(texts, Letters(), context=16, rows=10**6)
    monkeypatch.setattr(packing, "TEXTS_PER_CALL", 7)
    monkeypatch.setattr(packing, "CHARACTERS_PER_CALL", 50)
    np.testing.assert_array_equal(packing.pack(texts, Letters(), context=16, rows=10**6).tokens_SL, whole.tokens_SL)


def test_packing_takes_about_four_bytes_a_token() -> None:
    documents, length = 4000, 500
    tracemalloc.start()
    try:
        packed = packing.pack(("a" * length for _ in range(documents)), Letters(), context=128, rows=10**9)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # As lists of Python integers, the tokens alone would take 8 bytes each.
    assert 4 * packed.tokens_SL.size < peak < 7 * packed.tokens_SL.size


@pytest.mark.parametrize(
    ("tokenizer", "separator", "padding", "left_out"),
    [(Letters(), 0, 2, [0, 1, 2]), (Qwen(), 1, 2, [1, 2]), (GPT2(), 1, 1, [1])],
)
def test_eos_stands_in_for_what_a_tokenizer_lacks(tokenizer: Any, separator: int, padding: int, left_out: list[int]) -> None:
    padded = packing.pad(["abc"], tokenizer, context=8, special_ids=packing.padding_ids(tokenizer))
    assert padded.tokens_SL.tolist() == [[separator, 100, 101, 102, *[padding] * 4]]
    assert padded.row_offsets.tolist() == [0, 3]
    assert packing.padding_ids(tokenizer) == left_out


def test_a_tokenizer_with_neither_bos_nor_eos_is_refused() -> None:
    class Bare(Letters):
        bos_token_id = eos_token_id = None

    for make in (
        lambda: packing.pack(["abc"], Bare(), context=8, rows=1),
        lambda: packing.pad(["abc"], Bare(), context=8, special_ids=[]),
    ):
        with pytest.raises(BadInputError, match="neither a BOS nor an EOS"):
            make()


@given(st.lists(st.text(LETTERS, max_size=30), min_size=1, max_size=20), st.integers(8, 16))
def test_packing_keeps_every_token_in_order_and_no_special_one_as_a_row(texts: list[str], context: int) -> None:
    tokens = [3 + ord(letter) for text in texts for letter in text]
    nonempty = [text for text in texts if text]
    # A BOS stands before every document.
    if len(tokens) + len(nonempty) < context:
        with pytest.raises(BadInputError):
            packing.pack(texts, Letters(), context=context, rows=10**6)
        return
    packed = packing.pack(texts, Letters(), context=context, rows=10**6)
    assert packed.tokens_SL.shape[1] == context
    assert (packed.tokens_SL[:, 0] == 0).all()
    flat = packed.tokens_SL.ravel()
    kept = flat[flat > 2].tolist()
    assert kept == tokens[: len(kept)]
    # What is left out is the last sequence, which did not fill.
    assert len(tokens) - len(kept) < context
    assert packed.row_offsets[-1] == len(kept)
    for text, start in zip(nonempty, packed.doc_starts, strict=False):
        assert flat[start] == 3 + ord(text[0])
        assert flat[start - 1] == 0


@given(st.lists(st.text(LETTERS, min_size=1, max_size=30), min_size=1, max_size=10), st.integers(8, 16))
def test_probe_texts_are_one_sequence_each(texts: list[str], context: int) -> None:
    padded = packing.pad(texts, Letters(), context=context, special_ids=packing.padding_ids(Letters()))
    for index, text in enumerate(texts):
        expected = [0, *(3 + ord(letter) for letter in text)][:context]
        assert padded.tokens_SL[index].tolist() == expected + [2] * (context - len(expected))
        assert padded.row_offsets[index + 1] - padded.row_offsets[index] == len(expected) - 1


def test_an_empty_probe_text_is_refused() -> None:
    with pytest.raises(BadInputError, match="text 1 has no tokens"):
        packing.pad(["a", ""], Letters(), context=8, special_ids=packing.padding_ids(Letters()))
