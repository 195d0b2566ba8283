"""Reads an experiment, which declares a whole study in one TOML file, and checks that its sections agree.

`pipeline.study.sections` says where each section is defined. Fields that determine an artefact's bytes are hashed into its
key (`pipeline.study.plan`).
"""

import json
import re
import tomllib
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from pipeline.errors import BadInputError
from pipeline.models.model_section import KnownFeatures, ModelConfig
from pipeline.section import Section
from pipeline.store.limits import FEWEST_HELDOUT
from pipeline.study.arms import Recipes, check
from pipeline.study.recipe import ArmConfig, TrainConfig
from pipeline.study.references import Reference
from pipeline.study.saebench_section import SAEBenchConfig
from pipeline.study.sections import EvaluateConfig, RunConfig, StoreConfig, StudyConfig, Worth, explain
from pipeline.texts.text_sections import CorpusConfig, ProbesConfig, SyntheticCorpus

EXPERIMENTS = Path("experiments")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def _default_probes(validated: dict[str, Any]) -> ProbesConfig:
    return ProbesConfig(datasets=()) if isinstance(validated.get("model"), KnownFeatures) else ProbesConfig()


class Experiment(Section):
    """A whole study."""

    name: str
    """File name without `.toml`; the report's folder has the same name."""
    argument: str
    """The name or path that the user gave; messages that suggest a command repeat it."""
    description: str
    """What the study asks, in a sentence or two; shown in the report."""
    model: ModelConfig
    corpus: CorpusConfig
    store: StoreConfig
    probes: ProbesConfig = Field(default_factory=_default_probes)
    train: TrainConfig
    arms: dict[str, ArmConfig] = Field(default_factory=dict[str, ArmConfig])
    """Arms that the experiment adds to the built-in ones, by name. The field `study.arms` lists the arms to train."""
    references: dict[str, Reference] = Field(default_factory=dict[str, Reference])
    """SAEs that others trained, by the name that the study gives them; shown beside the arms."""
    study: StudyConfig
    worth: Worth = Worth()
    evaluate: EvaluateConfig = EvaluateConfig()
    saebench: SAEBenchConfig = SAEBenchConfig()
    run: RunConfig = RunConfig()

    @classmethod
    def load(cls, name_or_path: str) -> Self:
        """Read and validate an experiment: a name in `experiments/`, or the path of a TOML file.

        Raises BadInputError with one line that names the field and the value.
        """
        path = Path(name_or_path)
        if path.suffix != ".toml":
            path = EXPERIMENTS / f"{name_or_path}.toml"
        if not path.is_file():
            known = ", ".join(available()) or "none here: run from the folder that holds experiments/"
            meant = Path(f"{name_or_path}.toml")
            remedy = f"did you mean {meant}?" if meant.is_file() else f"known experiments: {known}"
            raise BadInputError(f"no experiment {name_or_path!r} ({path} is not a file); {remedy}")
        try:
            declared: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadInputError(f"{path} is not valid TOML: {error}") from None
        for key in ("name", "argument"):
            if key in declared:
                raise BadInputError(f"{path}: remove the key `{key}`, the file name is the experiment's name")
        try:
            # Strict JSON mode: no coercion, but lists are accepted for tuples.
            fields = declared | {"name": path.stem, "argument": name_or_path}
            return cls.model_validate_json(json.dumps(fields, default=str), strict=True)
        except ValidationError as error:
            raise BadInputError(f"{path}: {explain(error)}") from None

    @cached_property
    def recipes(self) -> Recipes:
        """The recipe of every arm."""
        return Recipes(self.train, self.arms)

    def __copy__(self) -> Self:
        """`model_copy` calls this. The copy may get another `train`, so it must not keep the cached recipes."""
        copied = super().__copy__()
        vars(copied).pop("recipes", None)
        return copied

    @model_validator(mode="after")
    def _named(self) -> Self:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"experiment name {self.name!r} must be lower-case letters, digits, '.', '_' or '-'")
        return self

    @model_validator(mode="after")
    def _rows_and_texts_from_one_kind_of_model(self) -> Self:
        synthetic = isinstance(self.model, KnownFeatures)
        if synthetic != isinstance(self.corpus, SyntheticCorpus):
            raise ValueError(
                f'model.source "{self.model.source}" and corpus.source "{self.corpus.source}" do not go together: '
                f'either both are "synthetic" or neither is'
            )
        if synthetic and self.probes.datasets:
            raise ValueError("probes.datasets: a synthetic model reads no texts; remove the section [probes]")
        if synthetic and self.evaluate.saebench:
            raise ValueError("evaluate.saebench: a synthetic model is no language model; remove it")
        if synthetic and self.store.max_norm:
            raise ValueError("store.max_norm: a synthetic model has no massive rows; remove it")
        if not synthetic and not self.probes.datasets:
            raise ValueError("probes.datasets is empty, which only a synthetic model may have; name at least one data set")
        return self

    @model_validator(mode="after")
    def _layers_of_the_model(self) -> Self:
        if max(self.store.layers) >= self.model.depth:
            deepest, last = max(self.store.layers), self.model.depth - 1
            raise ValueError(f"store.layers: layer {deepest} does not exist, the model has layers 0 to {last}")
        return self

    @model_validator(mode="after")
    def _rows_to_train_on(self) -> Self:
        tokens, size, heldout = self.store.tokens, self.store.shard_rows, self.train.heldout_shards
        shards, within = -(-tokens // size), self.train.heldout_within or tokens
        if within > tokens:
            raise ValueError(f"train.heldout_within {within:,} is more than store.tokens {tokens:,}; lower it")
        held_until = -(-within // size)
        if heldout >= shards or heldout > held_until:
            raise ValueError(
                f"train.heldout_shards {heldout} leaves nothing to train on: {within:,} tokens "
                f"fill {held_until} shards of {size:,} rows; use more tokens or smaller shards"
            )
        held = min(tokens, held_until * size) - (held_until - heldout) * size
        if held < FEWEST_HELDOUT:
            raise ValueError(
                f"train.heldout_shards {heldout} holds out {held:,} of {tokens:,} tokens, "
                f"and L0 and FVU need at least {FEWEST_HELDOUT}; hold out one shard more, or change store.tokens"
            )
        # An upper bound: a corpus may be shorter, and max_norm leaves rows out.
        rows = (shards - heldout) * size
        if self.store.mode == "stream" and self.train.window_shards is None:
            raise ValueError(
                'store.mode "stream" needs train.window_shards, the shards that are mixed with each other, such as 64: '
                "up to twice as many are on disk at a time"
            )
        if self.train.batch_size > rows:
            raise ValueError(
                f"train.batch_size {self.train.batch_size:,} is more than the {rows:,} rows to train on; lower it"
            )
        return self

    @model_validator(mode="after")
    def _study_of_known_parts(self) -> Self:
        for layer in self.study.layers:
            if layer not in self.store.layers:
                raise ValueError(f"study.layers: layer {layer} is not among store.layers {list(self.store.layers)}")
        parts = {"layers": self.study.layers, "arms": self.study.arms, "seeds": self.study.seeds}
        for field, values in parts.items():
            if len(set(values)) != len(values):
                raise ValueError(f"study.{field} {list(values)} names a value twice")
        return self

    @model_validator(mode="after")
    def _references_beside_the_arms(self) -> Self:
        for name, reference in self.references.items():
            if name in self.study.arms:
                raise ValueError(f"references.{name}: an arm has this name, choose another one")
            if reference.layer not in self.study.layers:
                layers = list(self.study.layers)
                raise ValueError(f"references.{name}.layer: {reference.layer} is not among study.layers {layers}")
        return self

    @model_validator(mode="after")
    def _probes_within_the_latents(self) -> Self:
        if max(self.evaluate.k_values) > self.train.d_sae:
            raise ValueError(f"evaluate.k_values: {max(self.evaluate.k_values)} exceeds train.d_sae {self.train.d_sae}")
        return self

    @model_validator(mode="after")
    def _valid_arms(self) -> Self:
        check(self.study.arms, self.recipes, self.study.sparsities)
        return self


def available() -> list[str]:
    """Names of the experiments in the folder `experiments/` of the current folder."""
    return sorted(path.stem for path in EXPERIMENTS.glob("*.toml"))
