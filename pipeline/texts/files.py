"""Reads texts from files: corpora from parquet, JSON lines or plain text, labelled texts from two parquet files."""

import codecs
import glob
import hashlib
import json
import re
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from pipeline.artefacts import identity
from pipeline.errors import BadInputError, PipelineError
from pipeline.texts.python import TextsByClass, draw
from pipeline.texts.text_sections import FilesCorpus

ROWS_PER_READ = 1024
"""Rows of a parquet file in memory at once: a few megabytes of ordinary documents."""


def corpus_files(corpus: FilesCorpus) -> list[Path]:
    """The files of a corpus in reading order: sorted, and each only once, even if several patterns match it.

    Raises BadInputError for a pattern that matches no file and for a file of unknown format.
    """
    found = sorted(path for pattern in corpus.paths for path in _matching(pattern))
    for path in found:
        if path.suffix not in READERS:
            raise BadInputError(f"corpus.paths: {path} is in no known format; known are {', '.join(READERS)}")
    return list({path.resolve(): path for path in found}.values())


def corpus_fingerprint(corpus: FilesCorpus) -> str:
    """Hexadecimal SHA-256 over formats and contents of the files in reading order; their paths do not count.

    A plain text with a byte order mark has a name of its own, because stores made while the mark was read hold it.
    """
    with reading("the corpus"):
        return identity.fingerprint(
            (f"{index:08}{path.suffix}{' without mark' if _is_marked_text(path) else ''}", path)
            for index, path in enumerate(corpus_files(corpus))
        )


def _is_marked_text(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix == ".txt" and file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8


def corpus_texts(corpus: FilesCorpus) -> Iterator[str]:
    """The documents of all files in reading order.

    Raises BadInputError for what is not text, naming the file and its line or row.
    """
    for path in corpus_files(corpus):
        yield from texts_of_file(path, corpus.text_column)


def texts_of_file(path: Path, column: str) -> Iterator[str]:
    """The documents of one file of a corpus. Raises what `corpus_texts` does."""
    with reading(path):
        yield from READERS[path.suffix](path, column)


def probe_fingerprint(folder: Path) -> str:
    """Hexadecimal SHA-256 over the two files of a probe data set, and over how many repeated texts are left out, if any.

    The number counts, because stores made while repeated texts were drawn hold other texts.
    """
    with reading(folder):
        content = identity.fingerprint((f"{part}.parquet", folder / f"{part}.parquet") for part in ("train", "test"))
    repeated = _distinct(folder)[2]
    return hashlib.sha256(f"{content} without {repeated}".encode()).hexdigest() if repeated else content


def probe_texts(folder: Path, train_per_class: int, test_per_class: int, seed: int) -> tuple[TextsByClass, TextsByClass]:
    """Training and test texts by class, from the columns `text` and `label` of `train.parquet` and `test.parquet`.

    Classes are sorted; blank and repeated texts are left out, and training texts that are also test texts. Raises
    BadInputError for fewer than two classes, for classes that differ between the files, and for a class with fewer texts
    than asked for.
    """
    train, test, repeated = _distinct(folder)
    if len(train) < 2:
        raise BadInputError(f"{folder / 'train.parquet'} has {len(train)} classes, a probe needs two")
    if train.keys() != test.keys():
        one = min(train.keys() ^ test.keys())
        raise BadInputError(f"{folder}: class {one!r} is in only one of train.parquet and test.parquet")
    if repeated:
        _tell(f"{folder}: {repeated} repeated texts are left out, within a file or from train.parquet for being test texts")
    for part, texts in (("train", train), ("test", test)):
        if ambiguous := _count(texts) - len({text for of_class in texts.values() for text in of_class}):
            _tell(f"{folder / part}.parquet: {ambiguous} texts have a second label, and count for each of their classes")
    return (
        draw(str(folder), "train", train, train_per_class, seed),
        draw(str(folder), "test", test, test_per_class, seed),
    )


def _distinct(folder: Path) -> tuple[TextsByClass, TextsByClass, int]:
    """Training and test texts of a folder, every text once and in one part, and how many were left out for that."""
    train, test = (_by_class(folder / f"{part}.parquet") for part in ("train", "test"))
    if train and train == test:
        raise BadInputError(f"{folder}: test.parquet holds the texts of train.parquet, give it other texts")
    tested = {text for texts in test.values() for text in texts}
    once = {label: [text for text in dict.fromkeys(texts) if text not in tested] for label, texts in train.items()}
    tested_once = {label: list(dict.fromkeys(texts)) for label, texts in test.items()}
    repeated = _count(train) + _count(test) - _count(once) - _count(tested_once)
    return once, tested_once, repeated


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def _count(texts: TextsByClass) -> int:
    return sum(map(len, texts.values()))


def _by_class(path: Path) -> TextsByClass:
    texts: dict[Any, list[str]] = {}
    with reading(path):
        for row, (text, label) in enumerate(parquet_columns(path, ("text", "label")), start=1):
            if not isinstance(label, str | int):
                raise BadInputError(f"{path} row {row}: label is {type(label).__name__}, neither text nor a whole number")
            if checked_text(text, f"{path} row {row}").strip():
                texts.setdefault(label, []).append(text)
    return {str(label): texts[label] for label in sorted(texts)}


def checked_text(value: Any, place: str) -> str:
    """The value itself. Raises BadInputError for a value that no tokenizer accepts."""
    if not isinstance(value, str):
        raise BadInputError(f"{place}: expected text, found {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadInputError(f"{place}: the text holds half of a surrogate pair, which is no character") from None
    return value


def parquet_columns(path: Path, names: tuple[str, ...]) -> Iterator[tuple[Any, ...]]:
    """Values of the named columns, row by row. Raises BadInputError for a missing column."""
    import pyarrow.parquet

    with cast("Any", pyarrow.parquet.ParquetFile)(path) as file:  # pyarrow has no types
        for name in names:
            if name not in file.schema_arrow.names:
                raise BadInputError(f"{path} has no column {name!r}; its columns are {', '.join(file.schema_arrow.names)}")
        for batch in file.iter_batches(ROWS_PER_READ, columns=list(names)):
            yield from zip(*(batch.column(name).to_pylist() for name in names), strict=True)


@contextmanager
def reading(what: Path | str) -> Generator[None]:
    """Turn any error of reading into a BadInputError of one line."""
    import pyarrow as pa

    arrow_error = cast("type[Exception]", pa.ArrowException)  # pyarrow has no types
    try:
        yield
    except PipelineError:  # already one line; and BadInputError is a ValueError, which the last clause catches
        raise
    except UnicodeDecodeError as error:
        raise BadInputError(f"{what} is not UTF-8: {error.reason} at byte {error.start}") from None
    except (OSError, ValueError, arrow_error) as error:
        reason = re.sub(r"^\[Errno \d+\] ", "", " ".join(str(error).split()))
        raise BadInputError(f"{what} cannot be read: {reason}") from None


def _matching(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_file():  # literally: a file's name may contain brackets, which are no pattern then
        return [path]
    names = glob.glob(pattern, recursive=True)  # noqa: PTH207  # Path.glob takes no absolute pattern
    files = [file for name in names if (file := Path(name)).is_file()]
    if not files:
        problem = f"is a folder, name its files, such as {path / '*.parquet'}" if path.is_dir() else "matches no file"
        if "[" in pattern:
            problem += "; a bracket begins a choice of characters, and [[] is the bracket itself"
        raise BadInputError(f"corpus.paths: {pattern!r} {problem}")
    return files


def _parquet(path: Path, column: str) -> Iterator[str]:
    for row, (value,) in enumerate(parquet_columns(path, (column,)), start=1):
        yield checked_text(value, f"{path} row {row}")


def _json_lines(path: Path, column: str) -> Iterator[str]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError:
                raise BadInputError(f"{place} is not UTF-8") from None
            except json.JSONDecodeError as error:
                raise BadInputError(f"{place} is not JSON: {error}") from None
            if not isinstance(row, dict) or column not in row:
                raise BadInputError(f"{place} has no column {column!r}")
            yield checked_text(row[column], place)


def _plain(path: Path, _column: str) -> Iterator[str]:
    # read_text would turn \r\n into \n.
    yield path.read_bytes().decode("utf-8-sig")


READERS = {".parquet": _parquet, ".jsonl": _json_lines, ".txt": _plain}
