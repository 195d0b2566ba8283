"""The texts made from the Python installation: labels on a hand-made folder, splits on the real standard library."""

import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path

import pytest

from pipeline.errors import BadInputError
from pipeline.texts import python
from pipeline.texts.python import (
    PIECE,
    TASKS,
    Document,
    corpus_texts,
    probe_pieces,
    probe_texts,
    read_documents,
    standard_library,
)

TOOLS = '''"""What the module is for, in enough words to be kept as a text."""

import functools
\x0c
@functools.cache
def run(value):
    """What the function does, in enough words to be kept as a text."""
    return value  # a comment that stays in the source


class Tool:
    """What the class is for, in enough words to be kept as a text.

    A second paragraph,
        with a line that is indented.
    """

    kind = "text"

    async def use(self):
        """What the method does, in enough words to be kept as a text."""

        def helper():
            """Too short."""
            return "a string that is no docstring, and stays"

        return helper
'''
TOPICS = '''# Generated.
topics = {'assert': 'The "assert" statement\\n'
           '**********************\\n'
           '\\n'
           'Assert statements are a convenient way to insert assertions\\n',
 'with': r"""Short.

   The with statement is used to wrap the execution of a block.
"""}
'''


@pytest.fixture
def library(tmp_path: Path) -> Path:
    files = {
        "asyncio/tools.py": TOOLS,
        "pydoc_data/topics.py": TOPICS,
        "broken.py": "def broken(:\n" + TOOLS,
        "coding.py": "# coding: no-such-codec\n" + TOOLS,
        "copy.py": TOOLS,
        "site-packages/other.py": TOOLS.replace("enough", "many"),
        "lib-dynload/other.py": TOOLS.replace("enough", "many"),
        "unittest/test/other.py": TOOLS.replace("enough", "many"),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    (tmp_path / "nulls.py").write_bytes(b"value = 1\0")
    return tmp_path


def of_kind(documents: tuple[Document, ...], kind: str) -> list[Document]:
    return [document for document in documents if document.kind == kind]


def test_docstrings_are_labelled_by_what_they_document(library: Path) -> None:
    docstrings = of_kind(read_documents(library), "docstring")
    assert {document.text.split(",")[0]: document.documents for document in docstrings} == {
        "What the module is for": "module",
        "What the function does": "function",
        "What the class is for": "class",
        "What the method does": "function",
    }
    assert docstrings[2].text.endswith("as a text.\n\nA second paragraph,\n    with a line that is indented.")


def test_sources_are_top_level_definitions_without_docstrings(library: Path) -> None:
    run, tool = of_kind(read_documents(library), "source")
    assert run.text == "@functools.cache\ndef run(value):\n    return value  # a comment that stays in the source"
    assert tool.text.startswith('class Tool:\n\n    kind = "text"')
    assert tool.text.endswith('return "a string that is no docstring, and stays"\n\n        return helper')
    assert "What the" not in tool.text
    assert "Too short" not in tool.text


def test_reference_is_the_paragraphs_of_the_topics_in_either_notation(library: Path) -> None:
    assert [(document.module, document.text) for document in of_kind(read_documents(library), "reference")] == [
        ("assert", 'The "assert" statement\n**********************'),
        ("assert", "Assert statements are a convenient way to insert assertions"),
        ("with", "The with statement is used to wrap the execution of a block."),
    ]


def test_of_equal_texts_the_first_is_kept_and_tests_and_foreign_packages_are_not_read(library: Path) -> None:
    assert {document.package for document in read_documents(library)} == {"asyncio", "assert", "with"}


def source(text: str) -> Document:
    return Document(text=text, kind="source", module="tools.py", name="tools.py run 1")


def test_pieces_end_at_line_ends() -> None:
    lines = [f"line {number} {'.' * 23}" for number in range(10, 58)]
    pieces = probe_pieces(source("\n".join(lines)))
    assert "\n".join(pieces).split("\n") == lines
    assert {len(piece) for piece in pieces} == {PIECE - 1}


def test_short_ends_are_dropped_but_not_short_documents() -> None:
    line = "x" * (PIECE - 1)
    assert probe_pieces(source(f"{line}\nshort")) == [line]
    assert probe_pieces(source("short")) == ["short"]
    assert probe_pieces(source("x" * 1000)) == ["x" * 1000]


def test_of_a_docstring_only_the_opening_is_used() -> None:
    text = "\n".join(["The opening.", "", "x" * PIECE, "x" * PIECE])
    document = Document(text=text, kind="docstring", module="tools.py", name="tools.py", documents="module")
    assert probe_pieces(document) == ["The opening."]


def test_parts_share_no_module_and_no_text() -> None:
    documents = read_documents(standard_library())
    parts = {part: [document for document in documents if document.part == part] for part in ("corpus", "train", "test")}
    for field in ("module", "text"):
        values = [{getattr(document, field) for document in members} for members in parts.values()]
        assert len(set.union(*values)) == sum(map(len, values))


def test_the_corpus_is_large_and_its_end_is_like_the_rest() -> None:
    texts = list(corpus_texts())
    assert texts == list(corpus_texts())
    assert sum(map(len, texts)) > 2_500_000
    kind = {document.text: document.kind for document in read_documents(standard_library())}
    end = [kind[text] for text in texts[-len(texts) // 10 :]]
    for name in ("source", "docstring", "reference"):
        share = sum(kind[text] == name for text in texts) / len(texts)
        assert end.count(name) / len(end) == pytest.approx(share, abs=0.06)


@pytest.mark.parametrize("task", TASKS)
def test_probe_texts_are_as_many_as_asked_for_and_all_different(task: str) -> None:
    train, test = probe_texts(task, 300, 150, seed=42)
    assert list(train) == list(test) == list(TASKS[task])
    assert {len(texts) for texts in train.values()} == {300}
    assert {len(texts) for texts in test.values()} == {150}
    texts = list(chain(*train.values(), *test.values()))
    assert len(set(texts)) == len(texts)
    assert not set(texts) & set(corpus_texts())


def test_probe_texts_depend_on_the_seed_and_on_nothing_else() -> None:
    assert probe_texts("python/package", 20, 10, seed=1) == probe_texts("python/package", 20, 10, seed=1)
    assert probe_texts("python/package", 20, 10, seed=1) != probe_texts("python/package", 20, 10, seed=2)


def test_package_texts_come_from_the_sources_of_the_package() -> None:
    sources = {
        package: "\n".join(
            document.text
            for document in of_kind(read_documents(standard_library()), "source")
            if document.package == package
        )
        for package in TASKS["python/package"]
    }
    train, test = probe_texts("python/package", 50, 25, seed=0)
    for package, source in sources.items():
        assert all(text in source for text in train[package] + test[package])


def test_an_unknown_task_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BadInputError, match=r"no probe task 'python/colour'.*python/text-kind, python/package"):
        probe_texts("python/colour", 10, 10, seed=0)


def test_too_few_texts_are_refused_with_their_number() -> None:
    with pytest.raises(BadInputError, match=r"python/package: class 'asyncio' has \d+ texts for the train set, 99999 were"):
        probe_texts("python/package", 99_999, 10, seed=0)


def test_fingerprint_follows_the_content_of_what_is_read(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(changed: str) -> str:
        copy = Path(shutil.copytree(library, library.with_name(f"changed-{changed}".replace("/", "-"))))
        (copy / changed).write_text("changed = True\n")
        monkeypatch.setattr(python, "standard_library", lambda: copy)
        return python.fingerprint()

    monkeypatch.setattr(python, "standard_library", lambda: library)
    unchanged = python.fingerprint()
    assert fingerprint("site-packages/other.py") == unchanged
    assert fingerprint("copy.py") != unchanged


def test_importing_needs_nothing_heavy() -> None:
    code = "import sys, pipeline.texts.python; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
