"""Real text that every Python installation carries: the standard library's sources, docstrings and language reference.

Files are parsed, never imported. Every document belongs to one part, chosen by a hash of its module (of its topic, for the
reference), so that the corpus and the training and test texts of the probes never share a module.
"""

import ast
import functools
import hashlib
import inspect
import os
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pipeline.artefacts import identity
from pipeline.errors import BadInputError

Part = Literal["corpus", "train", "test"]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef

TASKS = {
    "python/text-kind": ("source", "docstring", "reference"),
    "python/package": ("asyncio", "email", "importlib", "xml"),
    "python/docstring-of": ("class", "function"),
}
"""Probe tasks and their classes. The packages are ones that no distribution leaves out of its `python3`."""

SHORTEST = 30
"""Characters below which a document is dropped."""
PIECE = 256
"""Characters of a probe text, at most: about 64 tokens."""
TRAIN, TEST = 0.3, 0.17
"""Shares of the modules whose texts train and test the probes; the corpus has the rest."""
SALT = "33"
"""Modules differ in size, so luck decides how even the parts are; with this salt every class has texts to spare."""

TOPICS = "pydoc_data/topics.py"
NOT_READ = {"test", "tests", "idle_test", "encodings"}
"""Folders of tests and tables."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text and its labels."""

    text: str
    kind: Literal["source", "docstring", "reference"]
    module: str
    """Path below the standard library; the topic, for the reference."""
    name: str
    """Unique among documents of the same kind."""
    documents: Literal["class", "function", "module"] | None = None
    """What a docstring documents."""

    @property
    def part(self) -> Part:
        """The part that the module belongs to."""
        position = int(_hash(SALT + self.module)[:8], 16) / 16**8
        if self.package in TASKS["python/package"]:
            position *= TRAIN + TEST  # too small to leave a part to the corpus
        return "train" if position < TRAIN else "test" if position < TRAIN + TEST else "corpus"

    @property
    def package(self) -> str:
        """The top-level package; for a single module, its file."""
        return self.module.split("/")[0]


def fingerprint() -> str:
    """SHA-256 over name and content of every file read, in hexadecimal: the identity of all texts here."""
    return _fingerprint(_standard_library())


def corpus_texts() -> Iterator[str]:
    """Documents of the corpus in a fixed order that mixes kinds and modules: the end is as good a sample as the rest."""
    documents = [document for document in read_documents(_standard_library()) if document.part == "corpus"]
    for document in sorted(documents, key=lambda document: _hash(f"{document.kind} {document.name}")):
        yield document.text


def probe_texts(
    task: str, train_per_class: int, test_per_class: int, seed: int
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Texts of a task in `TASKS` by class, for training and for testing; no text occurs twice.

    Raises BadInputError for an unknown task, and when a class has fewer texts than asked for.
    """
    if task not in TASKS:
        raise BadInputError(f"no probe task {task!r}; tasks made from the Python installation: {', '.join(TASKS)}")
    pieces: dict[Part, dict[str, list[str]]] = {part: {label: [] for label in TASKS[task]} for part in ("train", "test")}
    seen: set[str] = set()
    for document in read_documents(_standard_library()):
        label = _label(task, document)
        if label is None or label not in TASKS[task] or document.part == "corpus":
            continue
        new = dict.fromkeys(piece for piece in probe_pieces(document) if piece not in seen)
        seen.update(new)
        pieces[document.part][label] += new
    return (
        draw(task, "train", pieces["train"], train_per_class, seed),
        draw(task, "test", pieces["test"], test_per_class, seed),
    )


def draw(source: str, part: str, texts: dict[str, list[str]], count: int, seed: int) -> dict[str, list[str]]:
    """`count` texts of every class, in an order that depends on nothing but the texts and the seed.

    Raises BadInputError, which names `source` and `part`, for a class that has fewer.
    """
    for label, of_class in texts.items():
        if len(of_class) < count:
            raise BadInputError(
                f"{source}: class {label!r} has {len(of_class)} texts for the {part} set, {count} were asked for"
            )
    return {label: sorted(of_class, key=lambda text: _hash(f"{seed} {text}"))[:count] for label, of_class in texts.items()}


@functools.cache
def read_documents(folder: Path) -> tuple[Document, ...]:
    """Every document of a standard library's folder, by file; of equal texts only the first, none shorter than SHORTEST."""
    documents: dict[str, Document] = {}
    for name, path in _files(folder):
        try:
            with tokenize.open(path) as file:
                source = file.read()
            tree = ast.parse(source)
        except (SyntaxError, ValueError):  # among them UnicodeDecodeError and null bytes
            continue
        found = _topics(tree) if name == TOPICS else _module(name, source, tree)
        for document in found:
            if len(document.text) >= SHORTEST:
                documents.setdefault(document.text, document)
    return tuple(documents.values())


def probe_pieces(document: Document) -> list[str]:
    """What a document gives to the probes: the opening of a docstring, all of anything else, in pieces cut at line ends.

    A piece has at most PIECE characters unless one line has more; ends shorter than a third of that are dropped.
    """
    pieces = [""]
    for line in document.text.split("\n"):
        if pieces[-1] and len(pieces[-1]) + len(line) > PIECE:
            pieces.append("")
        pieces[-1] += line + "\n"
    pieces = [piece.strip("\n") for piece in pieces]
    if document.kind == "docstring":
        return pieces[:1]
    return [piece for piece in pieces if len(piece) > PIECE / 3] or pieces[:1]


def _label(task: str, document: Document) -> str | None:
    if task == "python/text-kind":
        return document.kind
    if task == "python/docstring-of":
        return document.documents
    return document.package if document.kind == "source" else None


@functools.cache
def _fingerprint(folder: Path) -> str:
    return identity.fingerprint(_files(folder))


def _standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _files(folder: Path) -> list[tuple[str, Path]]:
    """(path below the folder with forward slashes, path) of every Python file to be read, sorted."""
    files = []
    for parent, folders, names in os.walk(folder):
        # Folders such as site-packages and lib-dynload are no packages: their names are no identifiers.
        folders[:] = [name for name in folders if name.isidentifier() and name not in NOT_READ]
        paths = (Path(parent, name) for name in names if name.endswith(".py"))
        files += [(path.relative_to(folder).as_posix(), path) for path in paths]
    return sorted(files)


def _topics(tree: ast.Module) -> Iterator[Document]:
    """Paragraphs of the language reference: the values of the one dictionary of `pydoc_data/topics.py`."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for topic, text in ast.literal_eval(statement.value).items():
                for index, paragraph in enumerate(text.split("\n\n")):
                    yield Document(text=inspect.cleandoc(paragraph), kind="reference", module=topic, name=f"{topic} {index}")


def _module(name: str, source: str, tree: ast.Module) -> Iterator[Document]:
    """The docstrings of one file, and its top-level functions and classes without them."""
    # A line number counts "\n" only; splitlines would also split at form feeds, which the standard library has.
    lines = source.split("\n")
    if docstring := ast.get_docstring(tree):
        yield Document(text=docstring, kind="docstring", module=name, name=name, documents="module")
    for statement in tree.body:
        if not isinstance(statement, Definition):
            continue
        definitions = [node for node in ast.walk(statement) if isinstance(node, Definition)]
        for node in definitions:
            if docstring := ast.get_docstring(node):
                documents = "class" if isinstance(node, ast.ClassDef) else "function"
                place = f"{name} {node.name} {node.lineno}"
                yield Document(text=docstring, kind="docstring", module=name, name=place, documents=documents)
        text = _source_without_docstrings(lines, statement, definitions)
        yield Document(text=text, kind="source", module=name, name=f"{name} {statement.name} {statement.lineno}")


def _source_without_docstrings(lines: list[str], statement: Definition, definitions: list[Definition]) -> str:
    dropped: set[int] = set()
    for node in definitions:
        first = node.body[0]
        if ast.get_docstring(node) is not None and first.lineno > node.lineno:
            dropped.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    start = min([statement.lineno, *(decorator.lineno for decorator in statement.decorator_list)])
    end = statement.end_lineno or statement.lineno
    return "\n".join(lines[number - 1] for number in range(start, end + 1) if number not in dropped)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
