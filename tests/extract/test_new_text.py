"""The text of a new store: as if it had been packed in memory, however often it was interrupted, in constant memory."""

import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty import files_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_store import flipped

from pipeline.artefacts.storage import LocalStorage
from pipeline.extract import new_text
from pipeline.extract.new_text import END, SO_FAR, NewText
from pipeline.store import format as fmt
from pipeline.store import text_arrays
from pipeline.store.text_arrays import StoredArray
from pipeline.texts import packing
from pipeline.texts.corpus import corpus_texts, documents
from pipeline.texts.text_sections import FilesCorpus, HuggingFaceCorpus

CONTEXT = 8


class Letters:
    """A tokenizer of one token per character, which counts the texts that it reads."""

    bos_token_id, eos_token_id, pad_token_id, all_special_ids = 0, 1, 2, (0, 1, 2)

    def __init__(self) -> None:
        self.read: list[str] = []

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        self.read += texts
        return {"input_ids": [list(text.encode()) for text in texts]}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of four sequences, groups of three texts, a record after every chunk."""
    for module in (text_arrays, new_text):
        monkeypatch.setattr(module, "ENTRIES", 4)
    monkeypatch.setattr(packing, "TEXTS_PER_CALL", 3)
    monkeypatch.setattr(new_text, "SECONDS_BETWEEN_RECORDS", 0.0)


def layout(rows: int) -> fmt.Layout:
    values: dict[str, Any] = {
        "rows": rows, "shard_rows": 64, "chunk_rows": 16, "layers": (3,), "d_in": 8, "dtype": "bfloat16", "codec": "raw",
        "row_order": "shuffled", "seed": 0, "special_ids": (0, 1, 2), "provenance": {},
    }  # fmt: skip
    return fmt.Layout.model_validate(values)


def corpus_of(folder: Path, texts: list[str]) -> FilesCorpus:
    """These texts in several files."""
    folder.mkdir(exist_ok=True)
    for number in range(0, len(texts), 7):
        pq.write_table(pa.table({"text": texts[number : number + 7]}), folder / f"{number:04}.parquet")
    return FilesCorpus(source="files", paths=(f"{folder}/*.parquet",))


def written(folder: Path, corpus: FilesCorpus, rows: int, *shorter: Path, tokenizer: Letters | None = None) -> Letters:
    """Write a text of so many rows, with the stores in `shorter` at hand."""
    tokenizer = tokenizer or Letters()
    relatives: Any = SimpleNamespace(stores=[SimpleNamespace(storage=LocalStorage(place)) for place in shorter])
    text = NewText(LocalStorage(folder), relatives, tokenizer, CONTEXT, rows)
    for _ in text.pack(corpus):
        pass
    text.lay_out(layout(min(text.packer.rows, rows)))
    return tokenizer


TEXTS = [chr(97 + n % 26) * (1 + n * 5 % 23) for n in range(60)]


def test_the_bytes_are_those_of_a_text_packed_in_memory(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "texts", TEXTS)
    for rows in (50, 300, 10**6):
        written(tmp_path / f"{rows}", corpus, rows)
        sequences = packing.pack(TEXTS, Letters(), context=CONTEXT, rows=rows)
        fmt.create(
            LocalStorage(tmp_path / f"whole-{rows}"),
            fmt.NewStore(layout=layout(min(rows, sequences.rows)), sequences=sequences),
        )
        streamed, whole_text = files_of(tmp_path / f"{rows}"), files_of(tmp_path / f"whole-{rows}")
        assert streamed.pop(END)
        assert {**streamed, fmt.ROOT: b""} == {**whole_text, fmt.ROOT: b""}


class Killed(BaseException):
    """The process is gone."""


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(1, 40), max_size=4), st.booleans())
def test_a_text_that_was_interrupted_anywhere_has_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, kills: list[int], damaged: bool
) -> None:
    folder = tmp_path_factory.mktemp("text")
    corpus = corpus_of(folder / "texts", TEXTS)
    written(folder / "expected", corpus, 400)
    write = LocalStorage.write
    for kill in kills:
        left = iter(range(kill))

        def dying(self: LocalStorage, name: str, content: Any, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise Killed
            write(self, name, content)

        with pytest.MonkeyPatch.context() as patch, suppress(Killed):
            patch.setattr(LocalStorage, "write", dying)
            written(folder / "killed", corpus, 400)
    if damaged and (folder / "killed" / SO_FAR).exists():
        flipped(folder / "killed" / SO_FAR)
    written(folder / "killed", corpus, 400)
    assert files_of(folder / "killed") == files_of(folder / "expected")


def test_what_was_packed_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus = corpus_of(tmp_path / "texts", TEXTS)
    before = Letters()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(NewText, "lay_out", lambda *_: None)
        written(tmp_path / "text", corpus, 10**6, tokenizer=before)
    after = written(tmp_path / "text", corpus, 10**6)
    assert before.read == TEXTS
    assert 0 < len(after.read) < 10
    assert after.read == TEXTS[-len(after.read) :]


def test_a_longer_text_begins_where_a_shorter_one_ends(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "texts", TEXTS)
    for rows in (100, 300):
        written(tmp_path / f"{rows}", corpus, rows)
    longer = written(tmp_path / "longer", corpus, 500, tmp_path / "100", tmp_path / "300")
    fresh = written(tmp_path / "fresh", corpus, 500)
    assert files_of(tmp_path / "longer") == files_of(tmp_path / "fresh")
    assert len(longer.read) < len(fresh.read) / 2
    assert (tmp_path / "longer/tokens/c/0/0").stat().st_nlink == 2
    # A text that is as long is all there; one that is longer is no beginning.
    assert written(tmp_path / "same", corpus, 500, tmp_path / "longer").read == []
    assert written(tmp_path / "short", corpus, 200, tmp_path / "longer").read[:3] == TEXTS[:3]
    flipped(tmp_path / "300/tokens/c/1/0")
    assert written(tmp_path / "undamaged", corpus, 500, tmp_path / "300").read == fresh.read
    assert files_of(tmp_path / "undamaged") == files_of(tmp_path / "fresh")


def test_passages_on_disk_are_those_in_memory(tmp_path: Path) -> None:
    written(tmp_path / "text", corpus_of(tmp_path / "texts", TEXTS), 10**6)
    storage = LocalStorage(tmp_path / "text")
    there, here = fmt.StoredSequences(storage), fmt.read_sequences(storage)
    for start in range(0, here.rows, 13):
        for stop in (start + 1, min(start + 60, here.rows), here.rows):
            one, other = there.passage(start, stop), here.passage(start, stop)
            for name, value in vars(one).items():
                np.testing.assert_array_equal(value, getattr(other, name), err_msg=f"{name} of {start} to {stop}")


@given(st.lists(st.integers(0, 30), min_size=1, max_size=40), st.integers(-1, 31), st.sampled_from(["left", "right"]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_search_on_disk_is_numpy_s(
    tmp_path_factory: pytest.TempPathFactory, values: list[int], value: int, side: Any
) -> None:
    storage, sorted_values = LocalStorage(tmp_path_factory.mktemp("array")), np.array(sorted(values))
    array = text_arrays.GrowingArray(storage, "x")
    array.append(sorted_values)
    array.finish()
    assert StoredArray(storage, "x").searchsorted(value, side) == np.searchsorted(sorted_values, value, side)


def test_memory_does_not_grow_with_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (text_arrays, new_text):
        monkeypatch.setattr(module, "ENTRIES", 1024)
    monkeypatch.setattr(new_text, "SECONDS_BETWEEN_RECORDS", 1e9)

    def peak(count: int) -> int:
        monkeypatch.setattr(new_text, "documents", lambda *_: Endless(count))
        tracemalloc.start()
        try:
            written(tmp_path / f"{count}", corpus_of(tmp_path / "texts", TEXTS), 10**9)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(100)  # imports and caches
    few, many = peak(300), peak(3_000)
    assert many - few < 2_700 * 190, "less than one byte a token, where tokens in memory take four"


class Endless:
    """So many equal documents."""

    def __init__(self, count: int):
        self.count = count

    def __iter__(self) -> Iterator[str]:
        return iter(["some words of text " * 10] * self.count)

    def place(self) -> dict[str, Any]:
        return {}


def test_every_place_of_a_corpus_in_files_leads_back(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "texts", TEXTS)
    for number in range(len(TEXTS) + 1):
        reading = documents(corpus)
        assert list(islice(reading, number)) == TEXTS[:number]
        assert list(documents(corpus, reading.place())) == TEXTS[number:]


def test_a_streamed_data_set_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    corpus_of(tmp_path / "texts", TEXTS)
    load, paths = datasets.load_dataset, sorted(map(str, (tmp_path / "texts").glob("*.parquet")))

    def local(_name: str, revision: str | None, split: str, streaming: bool) -> Any:
        return load("parquet", data_files=paths, split=split, streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", local)
    corpus = HuggingFaceCorpus(source="huggingface", name="someone/texts", revision="0" * 40)
    assert list(corpus_texts(corpus)) == TEXTS
    for number in (0, 1, 7, 20, 60):
        reading = documents(corpus)
        assert list(islice(reading, number)) == TEXTS[:number]
        assert list(documents(corpus, reading.place())) == TEXTS[number:]
