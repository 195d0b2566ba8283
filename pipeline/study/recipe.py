"""Defines the recipe of an SAE: the section [train] of an experiment, and [arms.NAME], which changes fields of it.

Every field is hashed into the keys of the SAEs (`pipeline.study.origins`).
"""

from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    SerializeAsAny,
    model_validator,
)

from pipeline.sae.activations import ACTIVATIONS
from pipeline.sae.jump_section import Jump
from pipeline.section import Before, Dtype, PositiveInt, Section, Seed, one_of
from pipeline.study.penalties import Contrast, PenaltySection, declared_penalty


def none_if_false(value: Any) -> Any:
    """TOML has no null: `contrast = false` removes the section."""
    return None if value is False else value


def tuple_of_list(value: Any) -> Any:
    """TOML has lists, and a recipe must be hashable."""
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value


class Resets(Section):
    """Re-initialisation of dead latents (docs/method.md, "Dead-latent resets")."""

    every: PositiveInt = 500
    """Steps between resets, and the window in which a latent must have fired to count as alive."""
    first: PositiveInt = 1000
    """Step of the first reset (the method's reset warm-up)."""


Prefixes = Annotated[tuple[PositiveInt, ...], BeforeValidator(tuple_of_list)]
Frozen = Literal["decoder", "soft-decoder", "encoder", "both"]


RANDOM_PART: dict[Frozen, str] = {
    "decoder": "random decoder",
    "soft-decoder": "nearly random decoder",
    "encoder": "random encoder",
    "both": "random directions",
}
"""What stays as it was drawn, in words."""

NO_PENALTY = "none"
"""The kind of penalty of a recipe without one."""


class AuxK(Section):
    """Revives dead latents by a term of the loss (docs/method.md, "Backbones"), as TopK SAEs are usually trained."""

    weight: PositiveFloat = 1 / 32
    """Of the term in the loss."""
    latents: PositiveInt | None = None
    """Dead latents on a row, at most; by default half of d_in."""
    dead_after: PositiveInt = 10_000_000
    """Rows after which a latent that fired on none of them is dead."""


class TrainConfig(Section):
    """The recipe of one SAE. [train] is the recipe of the arm `full`; the other arms change it (`pipeline.study.arms`)."""

    d_sae: Annotated[int, Field(ge=4)]
    """F, number of latents."""
    steps: PositiveInt
    batch_size: PositiveInt = 2048
    """B, rows per step."""
    activation: Annotated[str, AfterValidator(one_of(ACTIVATIONS)), Before("relu")] = "relu"
    """The activation function: a key of `pipeline.sae.activations.ACTIVATIONS`."""
    k: Annotated[PositiveInt | None, BeforeValidator(none_if_false), Before(None)] = None
    """Latents that fire on a row, for `topk`, or on average, for `batchtopk`. They take the place of `l1`."""
    auxk: Annotated[AuxK | None, BeforeValidator(none_if_false), Before(None)] = None
    """The term for dead latents, for `topk` and `batchtopk`."""
    prefixes: Annotated[Prefixes | None, BeforeValidator(none_if_false), Before(None)] = None
    """Widths that rise to d_sae, for `topk` and `batchtopk`: a Matryoshka SAE, whose first latents reconstruct alone."""
    jumprelu: Annotated[Jump | None, BeforeValidator(none_if_false), Before(None)] = None
    """Options of `jumprelu`, whose defaults hold without this section."""
    precision: Dtype = "float32"
    """Dtype of the operands of matrix products. Weights, summed gradients and Adam's state stay float32, and so does all of
    `jumprelu`, which autograd differentiates."""
    learning_rate: PositiveFloat = 3e-4
    lr_warmup: Annotated[int, Field(ge=0)] = 500
    """Steps over which the learning rate rises from 0."""
    lr_decay: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Last fraction of the steps over which the learning rate falls to 0."""
    l1: Annotated[float, Field(ge=0)] = 0.04
    """Weight of the sparsity term, for activations scaled to E||x||^2 = 1. For `jumprelu` the term is not an L1."""
    l0_target: Annotated[PositiveFloat | None, BeforeValidator(none_if_false), Before(None)] = None
    """L0 that training steers to by changing the weight of the sparsity term, beginning at `l1`; with `jumprelu.sparsity`
    "quadratic" the term itself aims at it."""
    l1_warmup: Annotated[int, Field(ge=0)] = 500
    """Steps over which the sparsity weight rises from 0."""
    match_l0: str | None = None
    """Arm whose L0 this one is matched to. A search that begins at `l1` finds the sparsity weight."""
    decoder_norm: Literal["free", "unit"] = "free"
    """`unit` keeps the rows of W_dec at norm 1, as in the vanilla baseline."""
    frozen: Annotated[Frozen | None, BeforeValidator(none_if_false), Before(None)] = None
    """A matrix that stays as it was drawn, as a control; `soft-decoder` keeps rows within a cosine of 0.8 to their start,
    `both` is a random SAE whose encoder is its decoder's transpose."""
    contrast: Annotated[Contrast | None, BeforeValidator(none_if_false)] = Contrast()
    penalty: Annotated[SerializeAsAny[PenaltySection] | None, BeforeValidator(declared_penalty), Before(None)] = None
    """A penalty of another kind, in place of the contrast."""
    resets: Annotated[Resets | None, BeforeValidator(none_if_false)] = Resets()
    heldout_shards: PositiveInt = 1
    """The last shards of the store are never trained on; evaluation reads them."""
    heldout_within: Annotated[PositiveInt | None, Before(None)] = None
    """Tokens that the store had before it grew. The held-out shards are the last of these, as they were, and all that came
    later is trained on."""
    data_seed: Seed = 0
    """Seed of the batch order. All arms and seeds share it, so they are compared on the same batches."""
    buffer_chunks: PositiveInt = 32
    """Chunks in the shuffle buffer that batches are drawn from."""
    window_shards: Annotated[PositiveInt | None, Before(None)] = None
    """Shards whose chunks are mixed with each other: a pass takes them in random order, so many at a time, and the first so
    many of the store give the scale. Without it, all of them; `store.mode` "stream" needs it."""

    @property
    def ever_resets(self) -> bool:
        """True if at least one reset comes early enough: a latent that is reset needs `resets.every` steps to learn."""
        return self.resets is not None and self.resets.first + self.resets.every <= self.steps

    @property
    def _aims_by_its_term(self) -> bool:
        return self.jumprelu is not None and self.jumprelu.sparsity == "quadratic"

    @property
    def steered_to(self) -> float | None:
        """The L0 to which training steers `l1`; None where `l1` stays as it is."""
        return None if self._aims_by_its_term else self.l0_target

    @property
    def backbone(self) -> str:
        """The activation, and what makes another SAE of it."""
        parts = [self.activation, "Matryoshka" if self.prefixes else "", RANDOM_PART[self.frozen] if self.frozen else ""]
        return ", ".join(filter(None, parts))

    @property
    def penalty_kind(self) -> str:
        """The kind of the penalty, in a word."""
        return self.only_penalty.kind if self.only_penalty else NO_PENALTY

    @property
    def only_penalty(self) -> Contrast | PenaltySection | None:
        """The contrast or the penalty of another kind, whichever is set."""
        return self.contrast or self.penalty

    @model_validator(mode="after")
    def _one_penalty(self) -> Self:
        if self.contrast and self.penalty:
            raise ValueError(f"contrast and penalty {self.penalty.kind!r} are both set; set contrast = false")
        return self

    @model_validator(mode="after")
    def _l0_target_where_it_steers(self) -> Self:
        if self.jumprelu and self.activation != "jumprelu":
            raise ValueError(f"jumprelu has options of another activation than {self.activation!r}; set jumprelu = false")
        if self._aims_by_its_term and self.l0_target is None:
            raise ValueError('jumprelu.sparsity "quadratic" is the distance to l0_target; set l0_target')
        if self.l0_target is None:
            return self
        if ACTIVATIONS[self.activation].fixes_l0:
            raise ValueError(
                f"l0_target {self.l0_target:g} steers l1, and activation {self.activation!r} fixes L0 by k; "
                "set l0_target = false"
            )
        if self.l0_target > self.d_sae:
            raise ValueError(f"l0_target {self.l0_target:g} is more than the {self.d_sae} latents; lower it")
        if self.match_l0:
            raise ValueError(f"match_l0 {self.match_l0!r} and l0_target {self.l0_target:g} both decide L0; remove one")
        if not self.l1:
            raise ValueError(f"l0_target {self.l0_target:g} cannot be reached from l1 0; set l1 above 0")
        return self

    @model_validator(mode="after")
    def _k_where_it_means_something(self) -> Self:
        fixed = ACTIVATIONS[self.activation].fixes_l0
        if fixed and self.k is None:
            raise ValueError(f"activation {self.activation!r} needs k, the number of latents that fire on a row; set k")
        if self.k is not None and not fixed:
            kinds = " or ".join(repr(name) for name, known in ACTIVATIONS.items() if known.fixes_l0)
            raise ValueError(f"k {self.k} means nothing to activation {self.activation!r}; set k = false, or choose {kinds}")
        if self.auxk and not fixed:
            raise ValueError(f"auxk is for activations that need k, not for {self.activation!r}; set auxk = false")
        if self.prefixes and not fixed:
            raise ValueError(f"prefixes are for activations that need k, not for {self.activation!r}; set prefixes = false")
        if self.prefixes and (self.prefixes[-1] != self.d_sae or sorted(set(self.prefixes)) != list(self.prefixes)):
            raise ValueError(f"prefixes {list(self.prefixes)} must rise to d_sae {self.d_sae}; order them and end with it")
        if self.k is not None and self.k > self.d_sae:
            raise ValueError(f"k {self.k} is more than the {self.d_sae} latents; lower it")
        if fixed and self.match_l0:
            raise ValueError(f"match_l0 searches l1, and activation {self.activation!r} fixes L0 by k; remove match_l0")
        return self

    @model_validator(mode="after")
    def _frozen_is_not_reset(self) -> Self:
        if self.frozen and self.resets:
            raise ValueError(f"resets would move what frozen {self.frozen!r} keeps; set resets = false")
        return self

    @model_validator(mode="after")
    def _resets_after_warmup(self) -> Self:
        warmup = max(self.lr_warmup, self.l1_warmup)
        if self.resets and self.resets.first < warmup:
            raise ValueError(f"the first reset, at step {self.resets.first}, would come before warm-up ends at {warmup}")
        return self

    @model_validator(mode="after")
    def _search_begins_above_zero(self) -> Self:
        if self.match_l0 and not self.l1:
            raise ValueError("the search for match_l0 cannot begin at l1 0; set l1 above 0")
        return self


class ArmConfig(Section):
    """An arm that the experiment declares. Its changes are written as in [train], such as `contrast.coefficient = 0.5`."""

    # The other fields are those of the recipe. `Recipes` in pipeline.study.arms validates them.
    model_config = ConfigDict(extra="allow")

    question: Annotated[str, Field(min_length=1)]
    """The question that the difference to the arm `against` answers, in a sentence; shown in the report."""
    base: Annotated[str, Field(alias="from")] = "full"
    """The arm that it changes: a built-in arm or one declared above. The key in the file is `from`."""
    against: str | None = None
    """The arm that it is compared with; without it, the arm that it changes."""

    @property
    def diff(self) -> dict[str, Any]:
        """The changed fields, nested as in the file. `contrast = false` removes the section."""
        return self.model_extra or {}
