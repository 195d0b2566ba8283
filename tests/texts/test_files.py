"""Corpora in files: every format, one order, and one line for whatever is wrong with them."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artefacts import identity
from pipeline.errors import BadInputError
from pipeline.study.experiment import Experiment
from pipeline.study.plan import make_plan
from pipeline.texts.corpus import corpus_texts
from pipeline.texts.files import ROWS_PER_READ, corpus_fingerprint
from pipeline.texts.text_sections import FilesCorpus


def files(*paths: Path | str, column: str = "text") -> FilesCorpus:
    return FilesCorpus(source="files", paths=tuple(str(path) for path in paths), text_column=column)


def read(*paths: Path | str, column: str = "text") -> list[str]:
    return list(corpus_texts(files(*paths, column=column)))


def parquet(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_every_format_is_read_in_sorted_order_and_no_file_twice(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    parquet(tmp_path / "c.parquet", text=["four", "five"], other=[1, 2])
    lines(tmp_path / "b.jsonl", {"text": "two"}, {"text": "three", "other": 1})
    (tmp_path / "a.txt").write_bytes("one\r\nGrüße\n".encode())
    (tmp_path / "deep" / "d.txt").write_text("six")
    in_order = ["one\r\nGrüße\n", "two", "three", "four", "five", "six"]
    assert read(tmp_path / "**/*.*") == in_order
    named_twice = (tmp_path / "deep/d.txt", tmp_path / "*.*", tmp_path / "deep/../a.txt")
    assert read(*named_twice) == in_order


def test_a_parquet_file_longer_than_one_read_is_read_whole(tmp_path: Path) -> None:
    texts = [f"text {row}" for row in range(ROWS_PER_READ + 5)]
    assert read(parquet(tmp_path / "long.parquet", body=texts), column="body") == texts


def test_blank_lines_and_brackets_in_a_name_mean_nothing(tmp_path: Path) -> None:
    path = tmp_path / "texts[1].jsonl"
    path.write_text('{"text": "one"}\n\n  \n{"text": "two"}')
    assert read(path) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\n", "a.csv is in no known format; known are .parquet, .jsonl, .txt"),
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8: unexpected end of data at byte 3"),
        ("a.jsonl", b'{"text": "good"}\n{"text": "caf\xe9"}\n', "a.jsonl:2 is not UTF-8"),
        ("a.jsonl", b'\n{"text": "cut off', "a.jsonl:2 is not JSON: Unterminated string"),
        ("a.jsonl", b'["text"]', "a.jsonl:1 has no column 'text'"),
        ("a.jsonl", b'{"body": "x"}', "a.jsonl:1 has no column 'text'"),
        ("a.jsonl", b'{"text": null}', "a.jsonl:1: expected text, found NoneType"),
        ("a.jsonl", b'{"text": "\\ud83d"}', "a.jsonl:1: the text holds half of a surrogate pair"),
        ("a.parquet", b"PAR1 or not", "a.parquet cannot be read: "),
    ],
)
def test_what_is_no_text_is_one_line_that_says_where(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInputError) as caught:
        read(tmp_path / name)
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_wrong_with_a_parquet_file_is_one_line_too(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", text=["one", None], number=[1, 2], raw=pa.array([b"x", b"caf\xe9"]))
    with pytest.raises(BadInputError, match=r"a.parquet has no column 'body'; its columns are text, number, raw$"):
        read(path, column="body")
    with pytest.raises(BadInputError, match=r"a.parquet row 2: expected text, found NoneType$"):
        read(path)
    with pytest.raises(BadInputError, match=r"a.parquet row 1: expected text, found int$"):
        read(path, column="number")
    undecodable = pa.Array.from_buffers(pa.string(), 2, pa.array([b"x", b"caf\xe9"]).buffers())
    with pytest.raises(BadInputError, match=r"b.parquet is not UTF-8"):
        read(parquet(tmp_path / "b.parquet", text=undecodable))


def test_patterns_that_match_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"corpus.paths: .*\*.txt' matches no file$"):
        read(tmp_path / "*.txt")
    with pytest.raises(BadInputError, match=r"is a folder, name its files, such as .*/\*.parquet$"):
        read(tmp_path)


def test_a_corpus_counts_by_content_and_order_not_by_place(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("first")
        (tmp_path / folder / "b.txt").write_text("second")
    one, two = (corpus_fingerprint(files(tmp_path / folder / "*.txt")) for folder in ("one", "two"))
    assert one == two
    (tmp_path / "two" / "a.txt").rename(tmp_path / "two" / "c.txt")
    assert corpus_fingerprint(files(tmp_path / "two/*.txt")) != one
    (tmp_path / "one" / "b.txt").write_text("third")
    assert corpus_fingerprint(files(tmp_path / "one/*.txt")) != one


def test_the_store_of_a_study_changes_with_the_files(tmp_path: Path, small_toml: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"body": "one"})
    declared = f'source = "files"\npaths = ["{path}"]\ntext_column = "body"'
    small_toml.write_text(small_toml.read_text().replace('source = "python"', declared))
    before = make_plan(Experiment.load(str(small_toml))).store
    assert before.label == "tiny-gemma2-files"
    assert str(tmp_path) not in str(before.inputs)
    lines(path, {"body": "two"})
    assert make_plan(Experiment.load(str(small_toml))).store.key != before.key


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "two"}\n')
    assert read(tmp_path / "a.txt", tmp_path / "b.jsonl") == ["one", "two"]
    marked = identity.fingerprint([("00000000.txt", tmp_path / "a.txt")])
    assert corpus_fingerprint(files(tmp_path / "a.txt")) != marked, "a store that holds the mark is another one"
    (tmp_path / "a.txt").write_bytes(b"one")
    plain = identity.fingerprint([("00000000.txt", tmp_path / "a.txt")])
    assert corpus_fingerprint(files(tmp_path / "a.txt")) == plain
