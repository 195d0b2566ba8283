"""Reads the documents of a corpus from its source."""

from collections.abc import Iterator
from typing import Any

from pipeline.errors import BadInputError
from pipeline.runtime.compatibility import quiet_hub
from pipeline.texts import files, python
from pipeline.texts.text_sections import FilesCorpus, HuggingFaceCorpus, PythonCorpus, TextCorpus


def corpus_texts(corpus: TextCorpus) -> Iterator[str]:
    """The documents of a corpus in a fixed order. Raises BadInputError for what cannot be read."""
    if isinstance(corpus, PythonCorpus):
        return python.corpus_texts()
    if isinstance(corpus, FilesCorpus):
        return files.corpus_texts(corpus)
    return _hub_texts(corpus)


def _hub_texts(corpus: HuggingFaceCorpus) -> Iterator[str]:
    import datasets

    with files.reading(f"corpus {corpus.name}"):
        with quiet_hub():
            rows: Any = datasets.load_dataset(corpus.name, revision=corpus.revision, split=corpus.split, streaming=True)
        for number, row in enumerate(rows, start=1):
            if corpus.text_column not in row:
                raise BadInputError(f"corpus.text_column: {corpus.name} has no column {corpus.text_column!r}")
            yield files.checked_text(row[corpus.text_column], f"{corpus.name} row {number}")
