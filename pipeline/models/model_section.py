"""Defines the section [model] of an experiment: the model whose activations are studied."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from pipeline.models.saelens_section import (
    ConstantMagnitude,
    FiringProbability,
    Hierarchy,
    LowRankCorrelation,
    Magnitude,
    Orthogonalization,
    Zipfian,
)
from pipeline.section import COMMIT, Dtype, PositiveInt, Section, Seed, needs_commit


class HuggingFaceModel(Section):
    """A decoder-only model from the Hugging Face Hub or a local folder."""

    source: Literal["huggingface"]
    name: Annotated[str, Field(min_length=1)]
    """Repository such as `google/gemma-2-2b`, or the path of a folder that holds the model."""
    revision: str | None = None
    """Commit of the repository; required, because a branch may move. A folder needs none: its content identifies it."""
    d_in: PositiveInt
    """Width of the residual stream; declared so that estimates need no download, and checked when the model is loaded."""
    depth: PositiveInt
    """Number of layers; declared and checked in the same way."""
    dtype: Dtype = "bfloat16"
    """Dtype in which the forward pass runs."""

    @model_validator(mode="after")
    def _pinned(self) -> Self:
        if not Path(self.name).is_dir() and not COMMIT.fullmatch(self.revision or ""):
            raise ValueError(f"{self.name!r} is no folder, and as a repository {needs_commit(self.name, self.revision)}")
        return self


class TinyModel(Section):
    """A small model of Gemma-2's architecture, trained here on the study's own corpus. Needs no download."""

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


class KnownFeatures(Section):
    """No language model: each row is a sum of known features that `sae_lens.synthetic` draws, so the truth is known."""

    name: ClassVar[str] = "synthetic"
    depth: ClassVar[int] = 1
    """Its one layer is layer 0."""
    dtype: ClassVar[Dtype] = "float32"
    """Dtype in which rows are summed."""
    d_in: Annotated[int, Field(ge=2)]
    """Width of a row."""
    features: Annotated[int, Field(ge=2)]
    """True features, each a unit direction; with more than d_in of them, they are in superposition."""


class SyntheticModel(KnownFeatures):
    """Each related pair of features is chosen, so that it is known.

    Features are numbered by falling probability: parents, then their children, then correlated pairs, then independent
    features. A probability is the fraction of rows on which a feature fires, its hierarchy and correlation included.
    """

    source: Literal["synthetic"]
    d_in: Annotated[int, Field(ge=2)] = 64
    features: Annotated[int, Field(ge=2)] = 256
    max_probability: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Probability with which the most frequent feature fires."""
    min_probability: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Probability with which the least frequent feature fires."""
    zipf_exponent: PositiveFloat = 1.0
    """Between the two, the probability of the feature of rank r falls as r to the power of -zipf_exponent."""
    magnitude_std: Annotated[float, Field(ge=0, le=0.25)] = 0.2
    """Standard deviation of the strength of a firing feature; the mean is 1."""
    parents: Annotated[int, Field(ge=0)] = 16
    """Features with children, which fire only on rows on which their parent fires."""
    children: PositiveInt = 3
    """Children of each parent."""
    correlated_pairs: Annotated[int, Field(ge=0)] = 32
    """Pairs of features that fire together more often than by chance; less often if `correlation` is negative."""
    correlation: Annotated[float, Field(gt=-1, lt=1)] = 0.8
    """Correlation of two normal variables; each feature of a pair fires when its variable exceeds a threshold."""
    similarity: Annotated[float, Field(ge=0, lt=1)] = 0.4
    """Cosine between the directions of child and parent, and of a correlated pair. All other directions are random."""
    seed: Seed = 0
    """Seed of the directions. `store.seed` is the seed of what fires on which row."""

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


class SAELensModel(KnownFeatures):
    """Features that `sae_lens.synthetic.SyntheticModel` relates by its own options; SynthSAEBench is one of its models.

    `features` and `d_in` are its `num_features` and `hidden_dim`. All else has SAELens' names and defaults, but for `seed`,
    which SAELens leaves to chance, and a `kind`, which it calls `generator_name`.
    """

    source: Literal["saelens-synthetic"]
    firing_probability: FiringProbability = Zipfian()
    mean_firing_magnitudes: Magnitude = ConstantMagnitude()
    """Of each feature's strength where it fires."""
    std_firing_magnitudes: Magnitude = ConstantMagnitude(value=0)
    """Negative strengths are cut to 0."""
    bias: Annotated[float, Field(ge=0)] = 1.0
    """Norm of a random vector that is added to every row."""
    hierarchy: Hierarchy | None = None
    orthogonalization: Orthogonalization | None = None
    correlation: LowRankCorrelation | None = None
    seed: Seed = 0
    """Seed of the model. `store.seed` is the seed of what fires on which row."""

    @model_validator(mode="after")
    def _room_for_the_roots(self) -> Self:
        roots = self.hierarchy.total_root_nodes if self.hierarchy else 0
        if roots > self.features:
            raise ValueError(
                f"hierarchy.total_root_nodes {roots:,} are more than the {self.features:,} features; lower them"
            )
        return self


ModelConfig = Annotated[HuggingFaceModel | TinyModel | SyntheticModel | SAELensModel, Field(discriminator="source")]
