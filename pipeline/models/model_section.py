"""The section [model] of an experiment: the model whose activations are studied."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipeline.section import COMMIT, Dtype, Section, Seed, needs_commit


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
            raise ValueError(f"{self.name!r} is no folder, and as a repository {needs_commit(self.name, self.revision)}")
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
