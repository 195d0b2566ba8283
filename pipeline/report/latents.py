"""Latents with the texts on which they fire, as the page shows them: ten of some SAEs, and many of each in its browser."""

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
