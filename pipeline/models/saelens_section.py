"""Defines the sections below [model] of a synthetic model that `sae_lens.synthetic` builds from its own options.

Options, defaults and bounds are SAELens' own. They are written again here because an experiment is checked without loading
SAELens; the tests compare the two.
"""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, model_validator

from pipeline.section import Fraction, PositiveInt, Section


class _Between(Section):
    """Probabilities between two bounds."""

    max_prob: Fraction = 0.3
    min_prob: Fraction = 0.01

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.min_prob >= self.max_prob:
            raise ValueError(f"min_prob {self.min_prob} is not less than max_prob {self.max_prob}; swap them")
        return self


class Zipfian(_Between):
    """The feature of rank r has r to the power of -exponent, stretched to lie between the bounds."""

    kind: Literal["zipfian"] = "zipfian"
    exponent: PositiveFloat = 1.0


class LinearProbability(_Between):
    """Falls in a straight line over the features."""

    kind: Literal["linear"]


class RandomProbability(_Between):
    """Drawn between the bounds, each as likely as another."""

    kind: Literal["random"]
    max_prob: Fraction = 0.5


class ConstantProbability(Section):
    """The same for all features."""

    kind: Literal["constant"]
    probability: Fraction = 0.1


class ConstantMagnitude(Section):
    """The same for all features."""

    kind: Literal["constant"] = "constant"
    value: Annotated[float, Field(ge=0)] = 1.0


class LinearMagnitude(Section):
    """From the first feature to the last in a straight line."""

    kind: Literal["linear"]
    start: PositiveFloat
    end: PositiveFloat


class ExponentialMagnitude(Section):
    """From the first feature to the last by equal factors."""

    kind: Literal["exponential"]
    start: PositiveFloat
    end: PositiveFloat


class FoldedNormalMagnitude(Section):
    """The absolute value of a normal variable, drawn once for each feature and then cut to the bounds."""

    kind: Literal["folded_normal"]
    mean: float = 0.0
    std: PositiveFloat = 0.1
    min_value: Annotated[float, Field(ge=0)] | None = None
    max_value: PositiveFloat | None = None

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        if self.min_value is not None and self.max_value is not None and self.min_value > self.max_value:
            raise ValueError(f"min_value {self.min_value} is more than max_value {self.max_value}; swap them")
        return self


FiringProbability = Annotated[
    Zipfian | LinearProbability | RandomProbability | ConstantProbability, Field(discriminator="kind")
]
Magnitude = Annotated[
    ConstantMagnitude | LinearMagnitude | ExponentialMagnitude | FoldedNormalMagnitude, Field(discriminator="kind")
]
Branching = Annotated[int, Field(ge=2)]


class Hierarchy(Section):
    """Trees of features, numbered by level: a child fires only on rows on which its parent fires.

    The trees take what features there are: where these run out, the last ones stay smaller.
    """

    total_root_nodes: PositiveInt = 100
    branching_factor: Branching | tuple[Branching, Branching] = 100
    """Children of each parent: a number, or the bounds between which it is drawn."""
    max_depth: PositiveInt = 2
    """Levels below the roots."""
    mutually_exclusive_portion: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the parents at the depths below of whose children at most one fires on a row."""
    mutually_exclusive_min_depth: Annotated[int, Field(ge=0)] = 0
    mutually_exclusive_max_depth: Annotated[int, Field(ge=0)] | None = None
    compensate_probabilities: bool = False
    """Children are drawn more often, so that about the probabilities that are asked for remain once the trees have
    silenced some."""
    scale_children_by_parent: bool = False
    """A child's strength is multiplied by that of its parent over the parent's mean."""

    @model_validator(mode="after")
    def _bounds_in_order(self) -> Self:
        branching, deepest = self.branching_factor, self.mutually_exclusive_max_depth
        if isinstance(branching, tuple) and branching[0] > branching[1]:
            raise ValueError(f"branching_factor {list(branching)} begins with the larger bound; swap them")
        if deepest is not None and deepest < self.mutually_exclusive_min_depth:
            raise ValueError(
                f"mutually_exclusive_max_depth {deepest} is less than mutually_exclusive_min_depth "
                f"{self.mutually_exclusive_min_depth}; swap them"
            )
        return self


class Orthogonalization(Section):
    """Gradient steps that push the directions, which begin at random, away from each other."""

    num_steps: PositiveInt = 200
    lr: PositiveFloat = 0.01
    chunk_size: PositiveInt = 1024
    """Directions at a time; bounds the memory."""


class LowRankCorrelation(Section):
    """Normal variables that all features share, each with weights of its own, move firings together."""

    rank: PositiveInt = 32
    correlation_scale: Annotated[float, Field(ge=0)] = 0.1
    """Standard deviation of the weights."""
