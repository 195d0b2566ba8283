"""The penalties on pairs of latents that an arm may train with: how each is declared, and where it is computed.

An entry names its term as "module:class", because the study is a floor below training and an experiment must be validated
without torch. A class itself does as well.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

from pydantic import PositiveFloat, PositiveInt, model_validator

from pipeline.section import Dtype, Fraction, Section


class PenaltySection(Section):
    """[train.penalty]: the penalty of an arm, by its kind. A kind with more fields has a subclass in PENALTIES."""

    kind: str
    """A key of PENALTIES."""
    coefficient: PositiveFloat
    """Weight of the penalty in the loss."""
    every: PositiveInt = 1
    """Compute the penalty on every n-th step only, n times as strong: the same on average."""


class Contrast(Section):
    """[train.contrast]: pairs of latents that point the same way and fire together (docs/method.md, "The loss")."""

    coefficient: PositiveFloat = 0.1
    """Weight c of the penalty."""
    by: Literal["direction", "magnitude"] = "direction"
    """`direction`: pairs by cosine, norms inside the strength detached. `magnitude`: pairs by dot product, norms trained."""
    topk: Fraction = 0.1
    """K: a latent's most similar fraction of the others that counts as pointing the same way."""
    select: Literal["union", "row", "mutual"] = "union"
    """`union`: in the top K of either latent; `row`: of the first; `mutual`: of both. The loss of `row` is the mean of the
    other two."""
    weighted: bool = True
    """Weight each pair by how strongly both fire; without it, every selected pair counts the same."""
    every: PositiveInt = 1
    """Compute the penalty on every n-th step only, n times as strong: the same on average."""
    pair_refresh: PositiveInt = 1
    """Steps after which each latent's similarity threshold, its k-th largest, is computed again; 1 is exact."""
    precision: Dtype = "float32"
    """Dtype of the products of latents and decoder rows. Similarities, which select the pairs, are always float32."""
    literal: bool = False
    """The penalty as first written down: summed over rows and ordered pairs with the diagonal, norms multiplied into the
    encoder. Kept to be shown, not used: it is expected to degenerate."""

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
    """What is declared of it: Contrast, or a subclass of PenaltySection."""
    term: str | Callable[..., Any]
    """The subclass of `train.penalty.PenaltyTerm` that computes it, or where it is: "module:class"."""


PENALTIES: dict[str, Penalty] = {
    "contrast": Penalty(section=Contrast, term="pipeline.train.contrast:ContrastTerm"),
    "literal": Penalty(section=Contrast, term="pipeline.train.literal:LiteralTerm"),
}
"""By kind. `[train.contrast]` declares the first two, `[train.penalty]` any other."""


def declared_penalty(value: Any) -> Any:
    """[train.penalty] as its kind's section. Raises ValueError for a kind that is not in PENALTIES."""
    if not isinstance(value, dict):
        return value
    declared = cast("dict[str, object]", value)
    kinds = {kind: entry.section for kind, entry in PENALTIES.items() if issubclass(entry.section, PenaltySection)}
    kind = declared.get("kind")
    if kind not in kinds:
        raise ValueError(f"penalty.kind: should be one of {', '.join(kinds) or 'none yet'}, got {kind!r}")
    return kinds[str(kind)].model_validate(declared, strict=True)
