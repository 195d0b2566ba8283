"""Defines the ablation arms and resolves their recipes. An arm changes a few fields of a recipe and asks one question.

The arms in `ARMS` exist in every experiment; `[arms.NAME]` in an experiment file declares more.
"""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

from pydantic import ValidationError

from pipeline.errors import BadInputError
from pipeline.sae.activations import ACTIVATIONS
from pipeline.study.recipe import ArmConfig, TrainConfig, none_if_false
from pipeline.study.sections import explain


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One row of the ablation table."""

    question: str
    """The question that the difference to `against` answers."""
    diff: Mapping[str, Any]
    """Fields of TrainConfig that differ from `base`, such as `resets`, or `contrast.topk` inside a section. None removes a
    section."""
    base: str = "full"
    """The arm that it changes."""
    compared_with: str | None = None
    """The arm that it is compared with, if not `base`."""
    run: int | None = None
    """Number of this arm's run in the method's original plan; None for an arm that was not in it."""

    @property
    def against(self) -> str:
        """The arm that it is compared with."""
        return self.compared_with or self.base


ARMS: dict[str, Arm] = {
    "baseline": Arm(
        run=0,
        question="What does a vanilla SAE reach: unit-norm decoder, no contrast, no resets?",
        diff={"decoder_norm": "unit", "contrast": None, "resets": None},
    ),
    "full": Arm(
        run=1,
        question="What does the whole method reach, with the recipe of [train]?",
        diff={},
    ),
    "magnitude": Arm(
        run=2,
        question="Does it matter that pairs are selected by direction rather than by dot product?",
        diff={"contrast.by": "magnitude"},
    ),
    "no-contrast": Arm(
        run=3,
        question="Does the contrastive term do anything? (the matched control)",
        diff={"contrast": None},
    ),
    "unweighted": Arm(
        run=4,
        question="Does weighting pairs by co-activation matter?",
        diff={"contrast.weighted": False},
    ),
    "coef-0.05": Arm(
        run=5,
        question="How sensitive is it to the coefficient (half)?",
        diff={"contrast.coefficient": 0.05},
    ),
    "coef-0.2": Arm(
        run=6,
        question="How sensitive is it to the coefficient (double)?",
        diff={"contrast.coefficient": 0.2},
    ),
    "topk-0.05": Arm(
        run=7,
        question="How sensitive is it to the number of pairs (half)?",
        diff={"contrast.topk": 0.05},
    ),
    "topk-0.2": Arm(
        run=8,
        question="How sensitive is it to the number of pairs (double)?",
        diff={"contrast.topk": 0.2},
    ),
    "warmup-2000": Arm(
        run=9,
        question="Does a later first reset of dead latents help?",
        diff={"resets.first": 2000},
    ),
    "warmup-500": Arm(
        run=10,
        question="Does an earlier first reset of dead latents help?",
        diff={"resets.first": 500},
    ),
    "row": Arm(
        question="Does it matter that pairs are selected from both sides: what if only the first latent's top K counts?",
        diff={"contrast.select": "row"},
    ),
    "mutual": Arm(
        question="Are the pairs that are in the top K of both latents enough?",
        diff={"contrast.select": "mutual"},
    ),
    "orthogonal": Arm(
        question="Is it enough to push similar directions apart, whether or not they fire together?",
        diff={"contrast.weighted": False, "contrast.coefficient": 0.03},
    ),
    "unit-norm": Arm(
        question="Do free decoder norms matter: the whole method under the baseline's constraint?",
        diff={"decoder_norm": "unit"},
    ),
    "frozen-decoder": Arm(
        question="What does a vanilla SAE reach when its decoder stays random and only the encoder learns?",
        diff={"frozen": "decoder"},
        base="baseline",
    ),
    "soft-frozen-decoder": Arm(
        question="And when its decoder rows stay within a cosine of 0.8 to their random start?",
        diff={"frozen": "soft-decoder"},
        base="baseline",
    ),
    "frozen-encoder": Arm(
        question="And when its encoder stays random, but for the biases?",
        diff={"frozen": "encoder"},
        base="baseline",
    ),
    "random": Arm(
        question="And when both stay random, the encoder tied to the decoder, and only the biases learn?",
        diff={"frozen": "both"},
        base="baseline",
    ),
    "other-order": Arm(
        question="What does another order of batches change? Whatever it does is drift, and no effect of an arm.",
        diff={"data_seed": 1},
        base="baseline",
    ),
    "l0-matched": Arm(
        question="Does a vanilla SAE do as well when it is as sparse as the whole method?",
        diff={"decoder_norm": "unit", "contrast": None, "resets": None, "match_l0": "full"},
    ),
    "literal": Arm(
        question="What does the penalty do as it was first written down, not averaged and with the diagonal?",
        # Computed by autograd, which supports none of the approximations.
        diff={
            "contrast.literal": True,
            "contrast.every": 1,
            "contrast.pair_refresh": 1,
            "contrast.precision": "float32",
        },
    ),
}

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,19}")
"""Form of an arm's name: it must suit a folder, the comma-separated list after --arms, and a plot label of 20 letters."""
SECTIONS = ("contrast", "penalty", "resets", "auxk", "jumprelu")
"""Sections of a recipe that an arm may remove by `false`, and take over from [train] by `true`."""
SHARED = ("d_sae", "steps", "batch_size", "heldout_shards", "heldout_within", "data_seed", "buffer_chunks", "window_shards")
"""Fields that no arm may change: arms are comparable only if all have the same size and see the same batches."""


def arms_of(own: Mapping[str, ArmConfig]) -> dict[str, Arm]:
    """The built-in arms and those that an experiment declares."""
    declared = {
        name: Arm(question=arm.question, base=arm.base, compared_with=arm.against, diff=dict(_flat(arm.diff)))
        for name, arm in own.items()
    }
    return ARMS | declared


class Recipes:
    """The recipe of every arm, by name. Each is resolved on first use, from `full` and the declared arms `own`."""

    def __init__(self, full: TrainConfig, own: Mapping[str, ArmConfig] | None = None):
        self.full = full
        self.own = own or {}
        self.arms = arms_of(self.own)
        self._resolved = {"full": full}
        self._at: dict[tuple[str, float], TrainConfig] = {}

    def __getitem__(self, arm: str) -> TrainConfig:
        """Raises BadInputError for an arm that does not exist or whose diff makes an invalid recipe."""
        if arm not in self.arms:
            raise BadInputError(f"unknown arm {arm!r}; the arms are {', '.join(self.arms)}")
        if arm not in self._resolved:
            self._resolved[arm] = self._resolve(arm)
        return self._resolved[arm]

    def at(self, arm: str, sparsity: float | None) -> TrainConfig:
        """The recipe of an arm at an L0 of a frontier. Raises BadInputError for an arm that cannot be trained at it."""
        if sparsity is None:
            return self[arm]
        if (arm, sparsity) not in self._at:
            self._at[arm, sparsity] = self._of_level(arm, sparsity)
        return self._at[arm, sparsity]

    def control(self, arm: str, study: Collection[str]) -> str | None:
        """The arm of the study that shows what the penalty of an arm does, or its other order of batches: one with neither.

        It is the one whose recipe differs in nothing else, or else the one that the arm is compared with. None without one,
        and for an arm that has neither.
        """
        if self._plain(arm) == self[arm]:
            return None
        plain = [other for other in study if self._plain(other) == self[other]]
        against = self.arms[arm].against
        alike = (other for other in plain if self[other] == self._plain(arm))
        return next(alike, against if against in plain else None)

    def _plain(self, arm: str) -> TrainConfig:
        """The recipe without a penalty, on the batches of the other arms."""
        return self[arm].model_copy(update={"contrast": None, "penalty": None, "data_seed": self.full.data_seed})

    def _of_level(self, arm: str, sparsity: float) -> TrainConfig:
        recipe, where = self[arm], f"study.sparsities: arm {arm!r} at {sparsity:g}"
        if recipe.match_l0:
            raise BadInputError(f"{where}: match_l0 decides its L0; leave the arm out, or remove match_l0")
        fixed = ACTIVATIONS[recipe.activation].fixes_l0
        if fixed and sparsity != int(sparsity):
            raise BadInputError(f"{where}: activation {recipe.activation!r} keeps a whole number of latents; round it")
        change = {"k": int(sparsity)} if fixed else {"l0_target": sparsity}
        try:
            return TrainConfig.model_validate(recipe.model_dump() | change, strict=True)
        except ValidationError as error:
            raise BadInputError(explain(error, where)) from None

    def _resolve(self, arm: str) -> TrainConfig:
        base, diff = self.arms[arm].base, self.arms[arm].diff
        where = f"arms.{arm}" if arm in self.own else f"arm {arm!r}"
        fields = self[base].model_dump()
        # Whole sections and kinds come first; the other changes then fill the new section.
        for path, value in sorted(diff.items(), key=lambda item: "." in item[0] and not item[0].endswith(".kind")):
            section, _, field = path.rpartition(".")
            if path in SECTIONS and value is True:
                fields[field] = self._of_full(field, where)
            elif not section:
                fields[field] = value
            elif path == f"{section}.kind":
                fields[section] = {"kind": value}  # fields of the old kind do not carry over
            elif fields.get(section, {}) is None and TrainConfig.model_fields[section].default is not None:
                raise BadInputError(f"{where} changes {path}, but {base!r} has no {section}")
            elif isinstance(fields.get(section), dict):
                fields[section][field] = value
            else:
                fields[section] = {field: value}  # no such section: the validation below reports it
        try:
            return TrainConfig.model_validate(fields, strict=True)
        except ValidationError as error:
            raise BadInputError(explain(error, where)) from None

    def _of_full(self, section: str, where: str) -> dict[str, Any]:
        """The section as [train] has it."""
        value = self.full.model_dump().get(section)
        if not isinstance(value, dict):
            raise BadInputError(f"{where}.{section}: true takes over [train.{section}], and there is none; name its fields")
        return cast("dict[str, Any]", value)


def check(study: Collection[str], recipes: Recipes, sparsities: Collection[float] = ()) -> None:
    """Check the arms that an experiment declares, and the names in `study`, which are the arms that it trains.

    Raises BadInputError for an invalid arm, for an arm whose L0 cannot be matched or that cannot be trained at one of the
    `sparsities`, for a warm-up that outlasts the training, and for two arms that cannot differ.
    """
    _check_own(recipes)
    if recipes.full.match_l0:
        raise BadInputError("train.match_l0: only an arm can be matched to another; set it in [arms.NAME]")
    for name in dict.fromkeys([*recipes.own, *study]):
        _check_match(name, study, recipes)
    first: dict[TrainConfig, str] = {}
    for name in study:
        _check_schedule(name, recipes)
        recipe, *_ = [recipes.at(name, level) for level in sparsities or (None,)]
        same = first.setdefault(recipe if recipe.ever_resets else recipe.model_copy(update={"resets": None}), name)
        if same != name:
            why = "have the same recipe in this experiment"
            if recipe != recipes[same]:
                why = f"differ in their resets alone, and none comes within the {recipe.steps:,} steps"
            raise BadInputError(f"study.arms: {same!r} and {name!r} {why}, remove one")


def _check_own(recipes: Recipes) -> None:
    known = list(ARMS)
    for name, arm in recipes.own.items():
        if not NAME.fullmatch(name):
            raise BadInputError(f"arms: name {name!r} must be at most 20 lower-case letters, digits, '.', '_' or '-'")
        if name in ARMS:
            raise BadInputError(f"arms.{name}: there is a built-in arm of this name, choose another one")
        if arm.base not in known:
            raise BadInputError(f"arms.{name}.from: no arm {arm.base!r} above this one; there are {', '.join(known)}")
        if arm.against is not None and arm.against not in {*ARMS, *recipes.own} - {name}:
            others = ", ".join([*ARMS, *recipes.own])
            raise BadInputError(f"arms.{name}.against: no other arm is called {arm.against!r}; there are {others}")
        for field in SHARED:
            if field in arm.diff:
                raise BadInputError(f"arms.{name}.{field}: all arms of a study share {field}; set it in [train]")
        _ = recipes[name]  # raises where it is invalid
        known.append(name)


def _check_match(name: str, study: Collection[str], recipes: Recipes) -> None:
    reference = recipes[name].match_l0
    if reference is None:
        return
    if recipes[reference].match_l0:
        raise BadInputError(f"arm {name!r}: match_l0 {reference!r} is itself matched to another arm, choose one that is not")
    if name in study and reference not in study:
        raise BadInputError(f"study.arms: {name!r} is matched to {reference!r}, which is not among them; add it")


def _check_schedule(name: str, recipes: Recipes) -> None:
    recipe = recipes[name]
    for field in ("lr_warmup", "l1_warmup"):
        if (warmup := getattr(recipe, field)) >= recipe.steps:
            where = "train" if getattr(recipes.full, field) == warmup else f"arm {name!r}"
            raise BadInputError(
                f"{where}: {field} {warmup:,} is not over before training ends at step {recipe.steps:,}; lower it"
            )


def _flat(declared: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Nested tables of the TOML as dotted paths."""
    for field, value in declared.items():
        if isinstance(value, dict):
            inner = cast("dict[str, Any]", value)
            yield from ((f"{field}.{name}", changed) for name, changed in inner.items())
        else:
            yield field, none_if_false(value) if field in (*SECTIONS, "frozen") else value
