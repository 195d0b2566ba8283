"""Latents with the texts on which they fire, as the page shows them: ten of an SAE, many in its browser, separated pairs."""

from typing import Literal

from pipeline.report.record import Frozen


class Context(Frozen):
    """A place in held-out text where a latent fires."""

    strength: float
    sequence: int
    position: int
    before: str
    token: str
    after: str


class Example(Frozen):
    """A latent and the texts on which it fires most, strongest first."""

    latent: int
    why: Literal["most captured", "least captured", "density"]
    density: float
    captured: int
    pairs: int
    contexts: tuple[Context, ...]


class Examples(Frozen):
    """The latents of one SAE that are shown, and why some or all are missing."""

    latents: tuple[Example, ...]
    reason: str | None


class ExamplesOf(Examples):
    """The same with the name of the SAE."""

    arm: str
    seed: int
    layer: int


class BrowsedContext(Frozen):
    """A text on which a latent fires."""

    strength: float
    before: str
    token: str
    after: str


class BrowsedLatent(Frozen):
    """A latent in the page's browser."""

    latent: int
    density: float
    captured: int
    pairs: int
    contexts: tuple[BrowsedContext, ...]


class BrowsedPair(Frozen):
    """A pair of latents that fire together."""

    latents: tuple[int, int]
    strength: float
    cosine: float
    captured: bool


class Browsing(Frozen):
    """What the page's browser has of one SAE; every latent of a pair is among its latents."""

    latents: tuple[BrowsedLatent, ...]
    pairs: tuple[BrowsedPair, ...]
    reason: str | None


class SeparatedPair(Frozen):
    """A pair of latents in the control and in the arm; where there are two numbers, in this order."""

    latents: tuple[int, int]
    cosine: tuple[float, float]
    co_activation: tuple[float, float]
    joint: tuple[int, int]
    """Tokens on which both fire."""
    same_direction: tuple[float, float]
    """Of each latent the cosine of its direction in the arm to its direction in the control."""
    together: tuple[BrowsedContext, ...]
    """Texts on which both fire in the control."""
    alone: tuple[tuple[BrowsedContext, ...], tuple[BrowsedContext, ...]]
    """Texts on which each fires most in the arm."""


class Separated(Frozen):
    """What became of the pairs that interfere most in an SAE's control."""

    control: str
    """The control's arm."""
    pairs: int
    """How many are followed; the next three count them."""
    separated: int
    """Most of their interference is gone, and both latents are live."""
    in_place: int
    """Separated, and both latents point where they do in the control."""
    lost: int
    """A latent is no longer live."""
    before: float
    """Their interference in the control."""
    after: float
    """The same pairs' in the arm."""
    shown: tuple[SeparatedPair, ...]
    reason: str | None


class SeparatedOf(Separated):
    """The same with the name of the SAE."""

    arm: str
    seed: int
    layer: int
    sparsity: float | None
    placebo: bool
    """Whether the arm has no penalty, and what became of the pairs is drift."""
