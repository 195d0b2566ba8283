"""The table of penalties on latents: the section that declares each, and the class that computes it."""

from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, PositiveFloat, model_validator

from pipeline.section import Dtype, Fraction, PositiveInt, Section
from pipeline.study.stage_code import StageCode

Chunk = Annotated[int, Field(ge=2)]


class PenaltySection(Section):
    """[train.penalty]: a penalty of another kind than the contrast. A kind with more fields has a subclass in PENALTIES."""

    kind: str
    """A key of PENALTIES."""
    coefficient: PositiveFloat
    """Weight of the penalty in the loss."""
    every: PositiveInt = 1
    """Compute the penalty on every n-th step only, n times as strong: the same on average."""


class Orthogonality(PenaltySection):
    """OrtSAE's penalty (docs/method.md, "Rivals"): squared cosine of each latent to its nearest neighbour. Theirs: 0.25."""

    chunk: Chunk = 8192
    """Latents among which the nearest neighbour is looked for; chunks are drawn anew for every step."""


class C2R(PenaltySection):
    """C2R's penalty (docs/method.md, "Rivals"): the same, weighted by how strongly the two fire in the batch. Theirs: 5."""

    chunk: Chunk = 8192
    """Latents among which the nearest neighbour is looked for; chunks are drawn anew for every step."""
    alpha: Annotated[float, Field(ge=0)] = 1.0
    """Power of the summed strengths of the two latents."""


class Contrast(Section):
    """[train.contrast]: penalises latents that point the same way and fire together (docs/method.md, "The loss")."""

    coefficient: PositiveFloat = 0.1
    """Weight c of the penalty."""
    by: Literal["direction", "magnitude"] = "direction"
    """`direction`: similarity is the cosine, and decoder norms get no gradient. `magnitude`: similarity is the dot product,
    and they do."""
    topk: Fraction = 0.1
    """K: fraction of the other latents, the most similar ones, that count as pointing the same way as a latent."""
    select: Literal["union", "row", "mutual"] = "union"
    """Which pairs count: those in the top K of either latent (`union`), of the first (`row`) or of both (`mutual`). The loss
    of `row` is the mean of the other two."""
    weighted: bool = True
    """Weight each pair by how strongly both fire; without it, every selected pair counts the same."""
    every: PositiveInt = 1
    """Compute the penalty on every n-th step only, n times as strong: the same on average."""
    pair_refresh: PositiveInt = 1
    """Steps after which each latent's similarity threshold, its k-th largest, is computed again; 1 is exact."""
    precision: Dtype = "float32"
    """Dtype of the products of latents and decoder rows. Similarities, which select the pairs, are always float32."""
    literal: bool = False
    """The penalty as first written down: a sum over rows and over ordered pairs, the diagonal included, with decoder norms
    multiplied into the encoder. Kept for comparison only: it is expected to degenerate."""

    @property
    def kind(self) -> str:
        """Its key in PENALTIES."""
        return "literal" if self.literal else "contrast"

    @model_validator(mode="after")
    def _literal_has_no_variants(self) -> Self:
        changed = self.model_fields_set - {"coefficient", "topk", "literal"}
        changed = {name for name in changed if getattr(self, name) != type(self).model_fields[name].default}
        if self.literal and changed:
            raise ValueError(f"the literal penalty has no variants: remove {', '.join(sorted(changed))}")
        return self


@dataclass(frozen=True, kw_only=True)
class Penalty:
    """One entry of PENALTIES."""

    section: type[Section]
    """The section that declares it: Contrast, PenaltySection or a subclass of that."""
    term: StageCode
    """The subclass of `pipeline.train.penalty.PenaltyTerm` that computes it."""
    claim: str = ""
    """Whose it is, and what they say of it, in a sentence; shown in the report. Empty for the method's own."""


PENALTIES: dict[str, Penalty] = {
    "contrast": Penalty(section=Contrast, term="pipeline.train.contrast:ContrastTerm"),
    "literal": Penalty(section=Contrast, term="pipeline.train.literal:LiteralTerm"),
    "c2r": Penalty(
        section=C2R,
        term="pipeline.train.nearest:C2RTerm",
        claim="C2R (Jin et al., ICML 2026, arXiv 2606.30609) pushes a latent from its nearest neighbour, harder the more "
        "both fire in the batch; its authors claim less absorption and more monosemantic latents.",
    ),
    "orthogonality": Penalty(
        section=Orthogonality,
        term="pipeline.train.nearest:OrthogonalityTerm",
        claim="OrtSAE (Korznikov et al., arXiv 2509.22033) pushes a latent from its nearest neighbour, whether or not the "
        "two fire; its authors claim less absorption and composition at little cost in explained variance, and no "
        "difference in sparse probing.",
    ),
}
"""By kind. [train.contrast] declares the first two, [train.penalty] any other."""


def declared_penalty(value: Any) -> Any:
    """Parse [train.penalty] into the section of its kind. Raises ValueError for a kind that is not in PENALTIES."""
    if not isinstance(value, dict):
        return value
    declared = cast("dict[str, object]", value)
    kinds = {kind: entry.section for kind, entry in PENALTIES.items() if issubclass(entry.section, PenaltySection)}
    kind = declared.get("kind")
    if kind not in kinds:
        known = f"known are {', '.join(kinds)}" if kinds else "none is registered in PENALTIES"
        raise ValueError(f"penalty.kind: {kind!r} is unknown; {known}")
    return kinds[str(kind)].model_validate(declared, strict=True)
