"""Reads the documents of a corpus from its source, from the first or from a place on."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Protocol

from pipeline.errors import BadInputError
from pipeline.runtime.compatibility import quiet_hub
from pipeline.texts import files, python
from pipeline.texts.text_sections import FilesCorpus, HuggingFaceCorpus, MixedCorpus, PythonCorpus, TextCorpus

Place = Mapping[str, Any]
"""Where a document is in its corpus, as JSON."""


class Documents(Protocol):
    """The documents of a corpus in a fixed order."""

    def __iter__(self) -> Iterator[str]:
        """The documents from the place on. Raises BadInputError for what cannot be read."""
        ...

    def place(self) -> Place:
        """Where the next document is."""
        ...


def corpus_texts(corpus: TextCorpus) -> Iterator[str]:
    """The documents of a corpus in a fixed order. Raises BadInputError for what cannot be read."""
    return iter(documents(corpus))


def documents(corpus: TextCorpus, place: Place | None = None) -> Documents:
    """The documents of a corpus, from a place on that `Documents.place` gave."""
    if isinstance(corpus, PythonCorpus):
        return _Counted(python.corpus_texts(), place)
    if isinstance(corpus, FilesCorpus):
        return _InFiles(corpus, place)
    if isinstance(corpus, MixedCorpus):
        return _Mixed(corpus, place)
    return _OnTheHub(corpus, place)


class _Counted:
    """Documents whose place is their number. What comes before a place is read again."""

    def __init__(self, texts: Iterator[str], place: Place | None):
        self.texts = texts
        self.number: int = place["number"] if place else 0

    def __iter__(self) -> Iterator[str]:
        for text in islice(self.texts, self.number, None):
            self.number += 1
            yield text

    def place(self) -> Place:
        return {"number": self.number}


class _InFiles:
    """Documents in files. Only the file of a place is read again from its beginning."""

    def __init__(self, corpus: FilesCorpus, place: Place | None):
        self.files, self.column = files.corpus_files(corpus), corpus.text_column
        self.file: int = place["file"] if place else 0
        self.row: int = place["row"] if place else 0

    def __iter__(self) -> Iterator[str]:
        while self.file < len(self.files):
            for text in islice(files.texts_of_file(self.files[self.file], self.column), self.row, None):
                self.row += 1
                yield text
            self.file, self.row = self.file + 1, 0

    def place(self) -> Place:
        return {"file": self.file, "row": self.row}


class _Mixed:
    """Documents of several corpora. The next one comes from the part that has least of its share of the characters."""

    def __init__(self, corpus: MixedCorpus, place: Place | None):
        self.weights = [part.weight for part in corpus.parts]
        places: Any = place["parts"] if place else [None] * len(corpus.parts)
        self.parts = [documents(part, known) for part, known in zip(corpus.parts, places, strict=True)]
        self.characters: list[int] = list(place["characters"]) if place else [0] * len(corpus.parts)
        """Read of each part so far."""

    def __iter__(self) -> Iterator[str]:
        texts = [iter(part) for part in self.parts]
        while True:
            share = [read / weight for read, weight in zip(self.characters, self.weights, strict=True)]
            behind = share.index(min(share))
            text = next(texts[behind], None)
            if text is None:
                return
            self.characters[behind] += len(text) + 1  # an empty text counts, too, or its part would stay behind
            yield text

    def place(self) -> Place:
        return {"parts": [dict(part.place()) for part in self.parts], "characters": list(self.characters)}


class _OnTheHub:
    """A data set that is streamed. Its library knows how to go on at a row."""

    def __init__(self, corpus: HuggingFaceCorpus, place: Place | None):
        self.corpus = corpus
        self.number: int = place["number"] if place else 0
        self.state: Any = place["state"] if place else None
        self.rows: Any = None

    def __iter__(self) -> Iterator[str]:
        import datasets

        name, column = self.corpus.name, self.corpus.text_column
        with files.reading(f"corpus {name}"):
            with quiet_hub():
                self.rows = datasets.load_dataset(
                    name, revision=self.corpus.revision, split=self.corpus.split, streaming=True
                )
            if self.state:
                self.rows.load_state_dict(self.state)
            for row in self.rows:
                self.number += 1
                if column not in row:
                    raise BadInputError(f"corpus.text_column: {name} has no column {column!r}")
                yield files.checked_text(row[column], f"{name} row {self.number}")

    def place(self) -> Place:
        return {"number": self.number, "state": self.rows.state_dict() if self.rows else self.state}
