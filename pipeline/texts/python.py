"""Reads real text from the Python installation: sources and docstrings of the standard library, and the language reference.

Files are parsed, never imported. A module (for the reference, a topic) belongs to one part, chosen by a hash of its name:
the corpus, the probes' training texts or their test texts. So the three never share a module.
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
Kind = Literal["source", "docstring", "reference"]
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
TextsByClass = dict[str, list[str]]
"""Labelled texts by the name of their class."""

TASKS = {
    "python/text-kind": ("source", "docstring", "reference"),
    "python/package": ("asyncio", "email", "importlib", "xml"),
    "python/docstring-of": ("class", "function"),
}
"""Probe tasks and their classes. Every distribution's `python3` has these packages."""

SHORTEST = 30
"""Characters of the shortest document that is kept."""
PIECE = 256
"""Most characters of a probe text: about 64 tokens."""
TRAIN, TEST = 0.3, 0.17
"""Fractions of the modules whose texts are for training and for testing probes; the rest is the corpus."""
SALT = "33"
"""Prefix of what is hashed. Modules differ in size, so the hash decides how large the parts are; with this prefix, every
class has more texts than the probes need."""

TOPICS = "pydoc_data/topics.py"
NOT_READ = {"test", "tests", "idle_test", "encodings"}
"""Folders that are left out: tests, and tables of characters."""


@dataclass(frozen=True, kw_only=True)
class Document:
    """A text and its labels."""

    text: str
    kind: Kind
    module: str
    """Path below the standard library's folder; for the reference, the topic."""
    name: str
    """Unique among documents of the same kind."""
    documents: Literal["class", "function", "module"] | None = None
    """What a docstring documents."""

    @property
    def part(self) -> Part:
        """The part that the module belongs to."""
        position = int(_hash(SALT + self.module)[:8], 16) / 16**8
        if self.package in TASKS["python/package"]:
            position *= TRAIN + TEST  # these packages are small, so all of them is for the probes
        return "train" if position < TRAIN else "test" if position < TRAIN + TEST else "corpus"

    @property
    def package(self) -> str:
        """The top-level package; for a single module, its file name."""
        return self.module.split("/")[0]


def standard_library() -> Path:
    """The folder of this Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def fingerprint() -> str:
    """Hexadecimal SHA-256 over name and content of every file that is read: the identity of all texts of this module."""
    return _fingerprint(standard_library())


def corpus_texts() -> Iterator[str]:
    """The corpus in a fixed order that mixes kinds and modules, so that its end is as good a sample as the rest."""
    documents = [document for document in read_documents(standard_library()) if document.part == "corpus"]
    for document in sorted(documents, key=lambda document: _hash(f"{document.kind} {document.name}")):
        yield document.text


def probe_texts(task: str, train_per_class: int, test_per_class: int, seed: int) -> tuple[TextsByClass, TextsByClass]:
    """Training and test texts by class of a task in `TASKS`; no text occurs twice.

    Raises BadInputError for an unknown task and for a class with fewer texts than asked for.
    """
    if task not in TASKS:
        raise BadInputError(f"no probe task {task!r}; tasks made from the Python installation: {', '.join(TASKS)}")
    pieces: dict[Part, TextsByClass] = {part: {label: [] for label in TASKS[task]} for part in ("train", "test")}
    seen: set[str] = set()
    for document in read_documents(standard_library()):
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


def draw(source: str, part: str, texts: TextsByClass, count: int, seed: int) -> TextsByClass:
    """`count` texts of every class, in an order that depends only on the texts and the seed.

    Raises BadInputError for a class with fewer texts, naming `source` and `part`.
    """
    for label, of_class in texts.items():
        if len(of_class) < count:
            raise BadInputError(
                f"{source}: class {label!r} has {len(of_class)} texts for the {part} set, {count} were asked for: "
                f"lower probes.{part}_size, or add texts"
            )
    return {label: sorted(of_class, key=lambda text: _hash(f"{seed} {text}"))[:count] for label, of_class in texts.items()}


@functools.cache
def read_documents(folder: Path) -> tuple[Document, ...]:
    """All documents of a standard library's folder, file by file, without repeated texts and texts shorter than SHORTEST."""
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
    """The probe texts of a document, cut at line ends: the opening of a docstring, all of a source or reference text.

    A piece has at most PIECE characters unless a single line is longer; pieces shorter than a third of that are dropped.
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


def _files(folder: Path) -> list[tuple[str, Path]]:
    """Path below the folder, with forward slashes, and path of every Python file to be read, sorted."""
    files: list[tuple[str, Path]] = []
    for parent, folders, names in os.walk(folder):
        # Skips site-packages and lib-dynload, whose names are not identifiers.
        folders[:] = [name for name in folders if name.isidentifier() and name not in NOT_READ]
        paths = (Path(parent, name) for name in names if name.endswith(".py"))
        files += [(path.relative_to(folder).as_posix(), path) for path in paths]
    return sorted(files)


def _topics(tree: ast.Module) -> Iterator[Document]:
    """Paragraphs of the language reference: the values of the dictionary in `pydoc_data/topics.py`."""
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            for topic, text in ast.literal_eval(statement.value).items():
                for index, paragraph in enumerate(text.split("\n\n")):
                    yield Document(text=inspect.cleandoc(paragraph), kind="reference", module=topic, name=f"{topic} {index}")


def _module(name: str, source: str, tree: ast.Module) -> Iterator[Document]:
    """The docstrings of one file, and its top-level functions and classes without them."""
    # Line numbers count only "\n"; splitlines would also split at form feeds, which the standard library has.
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
