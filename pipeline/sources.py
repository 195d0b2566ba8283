"""The sections of an experiment that say where its rows come from: a model, and what the model reads.

Every section is frozen and knows its fields' meaning; `pipeline.experiment` puts them together. What all sections share
stands here too: their base, and how pydantic's errors are said in one line.
"""

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

COMMIT = re.compile(r"[0-9a-f]{40}")

Dtype = Literal["bfloat16", "float32"]
Seed = Annotated[int, Field(ge=0)]
"""Of a random generator; numpy's take no negative one."""
Fraction = Annotated[float, Field(gt=0, le=1)]


class Section(BaseModel):
    """One table of the TOML file: frozen, and strict about keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def _needs_commit(repository: str, given: str | None) -> str:
    return (
        f"needs `revision`, the 40 hexadecimal digits of a commit, not {given!r}; "
        f"https://huggingface.co/{repository}/commits/main lists them"
    )


class HuggingFaceModel(Section):
    """A decoder-only model from the Hugging Face Hub or a local folder."""

    source: Literal["huggingface"]
    name: Annotated[str, Field(min_length=1)]
    """Repository such as `google/gemma-2-2b`, or the path of a folder that holds the model."""
    revision: str | None = None
    """Commit of the repository: a branch may move, and the study would mean something else. A folder needs none, it counts
    by its content."""
    d_in: PositiveInt
    """Width of the residual stream. Declared, so that estimates need no download; checked when the model is loaded."""
    depth: PositiveInt
    """Number of layers; declared and checked likewise."""
    dtype: Dtype = "bfloat16"
    """Dtype in which the forward pass runs."""

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if not Path(self.name).is_dir() and not COMMIT.fullmatch(self.revision or ""):
            raise ValueError(f"{self.name!r} is no folder, and as a repository {_needs_commit(self.name, self.revision)}")
        return self


class TinyModel(Section):
    """A small Gemma-2-architecture model, trained on the spot on the study's own corpus. Needs no download."""

    source: Literal["tiny"]
    name: ClassVar[str] = "tiny-gemma2"
    d_in: Annotated[int, Field(ge=16, multiple_of=16)] = 64
    """Width of the residual stream."""
    depth: Annotated[int, Field(ge=2)] = 4
    """Number of layers."""
    vocabulary: Annotated[int, Field(ge=300)] = 2048
    """Size of the byte-level BPE vocabulary, special tokens included."""
    steps: PositiveInt = 1000
    """Optimizer steps of language-model training."""
    batch_size: PositiveInt = 32
    """Sequences per step."""
    learning_rate: PositiveFloat = 6e-3
    dtype: Dtype = "float32"
    seed: Seed = 0


class SyntheticModel(Section):
    """No language model: rows are sums of known features that `sae_lens.synthetic` lets fire, so that the truth is known.

    Features are numbered by falling probability: first the parents, then their children, then the correlated pairs, and
    last those that fire independently. All probabilities are of a row and hold whatever is planted.
    """

    source: Literal["synthetic"]
    name: ClassVar[str] = "synthetic"
    depth: ClassVar[int] = 1
    """Its one layer is layer 0."""
    dtype: ClassVar[Dtype] = "float32"
    """Dtype in which rows are summed."""
    d_in: Annotated[int, Field(ge=2)] = 64
    """Width of a row."""
    features: Annotated[int, Field(ge=2)] = 256
    """True features, each a unit direction; more than d_in put them in superposition."""
    max_probability: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Probability with which the most frequent feature fires."""
    min_probability: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Probability with which the least frequent feature fires."""
    zipf_exponent: PositiveFloat = 1.0
    """How steeply probabilities fall in between: with the rank to the power of minus this."""
    magnitude_std: Annotated[float, Field(ge=0, le=0.25)] = 0.2
    """Standard deviation of how strongly a firing feature fires; the mean is 1."""
    parents: Annotated[int, Field(ge=0)] = 16
    """Features that have children, which fire only where their parent does."""
    children: PositiveInt = 3
    """Children of each parent."""
    correlated_pairs: Annotated[int, Field(ge=0)] = 32
    """Pairs of features that fire together more often (or, for a negative correlation, less often) than by chance."""
    correlation: Annotated[float, Field(gt=-1, lt=1)] = 0.8
    """Correlation of the two normal variables whose thresholds decide whether the two features of such a pair fire."""
    similarity: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Cosine of a child's direction to its parent's, and between a correlated pair's. All other directions are random."""
    seed: Seed = 0
    """Seed of the directions. What fires where is drawn from `store.seed`."""

    @model_validator(mode="after")
    def _room_for_what_is_planted(self) -> Self:
        if self.min_probability >= self.max_probability:
            raise ValueError(
                f"min_probability {self.min_probability} is not less than max_probability {self.max_probability}"
            )
        planted = self.parents * (1 + self.children) + 2 * self.correlated_pairs
        if planted > self.features:
            raise ValueError(
                f"features {self.features} are fewer than the {planted} that parents, children and correlated_pairs need"
            )
        return self


ModelConfig = Annotated[HuggingFaceModel | TinyModel | SyntheticModel, Field(discriminator="source")]


class PythonCorpus(Section):
    """Text that every Python installation carries: docstrings, sources and the language reference, read with `ast`."""

    source: Literal["python"]


class FilesCorpus(Section):
    """Texts in files on this machine. They count by content, wherever they lie."""

    source: Literal["files"]
    paths: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(min_length=1)]
    """Files, or patterns such as `texts/**/*.parquet`: .parquet, .jsonl, or .txt, which is one document. Read in sorted
    order, each once."""
    text_column: str = "text"
    """Column of a parquet file, key of a JSON line."""


class HuggingFaceCorpus(Section):
    """A text data set of the Hugging Face Hub, streamed."""

    source: Literal["huggingface"]
    name: Annotated[str, Field(min_length=1)]
    """Repository such as `monology/pile-uncopyrighted`."""
    revision: str | None = None
    """Commit of the repository; required, since a branch may move."""
    split: str = "train"
    text_column: str = "text"

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if Path(self.name).exists():  # `datasets` would prefer it to the Hub
            raise ValueError(f'{self.name!r} is a path on this machine: use source = "files" and paths = [...]')
        if not COMMIT.fullmatch(self.revision or ""):
            raise ValueError(f"{self.name!r} {_needs_commit(f'datasets/{self.name}', self.revision)}")
        return self


class SyntheticCorpus(Section):
    """No text: the rows are drawn from the synthetic model, which owns every parameter."""

    source: Literal["synthetic"]


TextCorpus = PythonCorpus | FilesCorpus | HuggingFaceCorpus
CorpusConfig = Annotated[TextCorpus | SyntheticCorpus, Field(discriminator="source")]

SOURCES = {
    tag
    for union in (ModelConfig, CorpusConfig)
    for section in get_args(get_args(union)[0])
    for tag in get_args(section.model_fields["source"].annotation)
}
"""Every value of `source`."""


def explain(error: ValidationError, where: str = "") -> str:
    """The first problem of a pydantic error as one line: field (inside `where`), what is wrong, the value given."""
    problems = error.errors(include_url=False)
    # A misspelt key also makes the right one missing: the spelling is what to talk about.
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    # Discriminated unions put the tag into the location; it is no key of the TOML.
    path = [str(part) for part in first["loc"] if part not in SOURCES]
    field = ".".join([where, *path] if where else path)
    kind, given, context = first["type"], first["input"], first.get("ctx", {})
    # What Python has as a tuple and JSON as an array, TOML has as a list.
    message = re.sub("tuple|array", "list", first["msg"].removeprefix("Value error, "), flags=re.IGNORECASE)
    if kind == "extra_forbidden":
        message = "unknown key, check its spelling or remove it"
    elif kind == "union_tag_not_found":
        message = f"{context['discriminator']} is missing, which says what kind it is"
    elif kind == "union_tag_invalid":
        message = "source should be one of " + context["expected_tags"]
        given = given["source"]
    shown = "" if kind in ("missing", "value_error", "extra_forbidden", "union_tag_not_found") else f", got {given!r}"
    return f"{field + ': ' if field else ''}{message[0].lower()}{message[1:]}{shown}"
