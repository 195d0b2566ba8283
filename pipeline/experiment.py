"""An experiment: a whole study declared in one TOML file, validated here and nowhere else.

Its sections on models and corpora are in `pipeline.sources`, the recipe of an SAE in `pipeline.recipe`. Every section is
frozen. A field that determines an artefact's bytes is hashed into its key (see `pipeline.plan`).
"""

import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, ValidationError, model_validator

from pipeline.arms import check
from pipeline.errors import BadInputError
from pipeline.recipe import ArmConfig, TrainConfig
from pipeline.sources import (
    CorpusConfig,
    Dtype,
    Fraction,
    ModelConfig,
    Section,
    Seed,
    SyntheticCorpus,
    SyntheticModel,
    explain,
)
from pipeline.store.codecs import Codec

EXPERIMENTS = Path("experiments")
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


class StoreConfig(Section):
    """What is extracted, and how it lies on disk."""

    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    """Residual stream after these layers (0 is the first), all filled by one forward pass."""
    tokens: PositiveInt
    """Rows wanted: tokens of text, special tokens not counted."""
    context: Annotated[int, Field(ge=8)] = 128
    """Tokens per sequence, the leading BOS included."""
    forward_batch: PositiveInt = 32
    """Sequences per forward pass. Part of the identity: matrix kernels round differently for other shapes."""
    dtype: Dtype = "bfloat16"
    """Dtype of the stored rows."""
    codec: Codec = "raw"
    """`raw` for local disks; `blosc` (zstd-1, byte shuffle) where storage gives less than about 370 MB/s per core."""
    shard_rows: PositiveInt = 32768
    """Rows per file, the unit of writing, committing and resuming."""
    chunk_rows: PositiveInt = 1024
    """Rows per chunk, the unit of reading. On an object store let it equal `shard_rows`, 8192: one GET per read."""
    max_norm: Annotated[float, Field(gt=1)] | None = None
    """Leave out rows whose norm exceeds this multiple of their shard's median norm: attention sinks other than the BOS."""
    seed: Seed = 0
    """Seed of the row order inside each shard; of the rows themselves, where the model is synthetic."""

    @model_validator(mode="after")
    def _whole_chunks(self) -> Self:
        if self.shard_rows % self.chunk_rows:
            raise ValueError(f"shard_rows {self.shard_rows} is not a multiple of chunk_rows {self.chunk_rows}")
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers {list(self.layers)} names a layer twice")
        return self


SAE_BENCH_DATASETS = (
    "LabHC/bias_in_bios_class_set1",
    "LabHC/bias_in_bios_class_set2",
    "LabHC/bias_in_bios_class_set3",
    "canrager/amazon_reviews_mcauley_1and5",
    "canrager/amazon_reviews_mcauley_1and5_sentiment",
    "codeparrot/github-code",
    "fancyzhx/ag_news",
    "Helsinki-NLP/europarl",
)
"""The data sets that sae-bench has loaders for."""


class ProbesConfig(Section):
    """Labelled texts for sparse probing. The defaults are sae-bench's published configuration."""

    datasets: tuple[str, ...] = SAE_BENCH_DATASETS
    """sae-bench's names, `python/...` tasks made from the Python installation, or folders that hold `train.parquet` and
    `test.parquet` with the columns `text` and `label`. None for a synthetic model."""
    train_size: Annotated[int, Field(ge=8)] = 4000
    """Rows of one binary training problem, half of them of the class (sae-bench's `probe_train_set_size`)."""
    test_size: Annotated[int, Field(ge=8)] = 1000
    context: Annotated[int, Field(ge=8)] = 128
    """Tokens per text, BOS included; longer texts are cut."""
    seed: Seed = 42

    @property
    def named(self) -> dict[str, str]:
        """Data sets by the name that artefacts and reports give them: a folder's own, without the path to it."""
        return {probe_name(dataset): dataset for dataset in self.datasets}

    @model_validator(mode="after")
    def _told_apart(self) -> Self:
        names = [probe_name(dataset) for dataset in self.datasets]
        for name in names:
            if names.count(name) > 1:
                same = [dataset for dataset in self.datasets if probe_name(dataset) == name]
                raise ValueError(f"datasets: {' and '.join(same)} are both called {name!r} in reports; rename or remove one")
        return self


def is_probe_folder(dataset: str) -> bool:
    """Whether a probe data set is a folder of this machine."""
    return any((Path(dataset) / f"{split}.parquet").is_file() for split in ("train", "test"))


def probe_name(dataset: str) -> str:
    """What artefacts and reports call a probe data set: a folder by its own name, any other as it is declared."""
    return Path(dataset).resolve().name if is_probe_folder(dataset) else dataset


class StudyConfig(Section):
    """Which SAEs are compared: every arm x seed x layer."""

    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    """Layers SAEs are trained on; each must be among the store's."""
    arms: Annotated[tuple[str, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)


class EvaluateConfig(Section):
    """How finished SAEs are measured."""

    k_values: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 5, 10, 20, 50)
    """Numbers of latents a sparse probe may use; the values sae-bench's output schema knows: 1 2 5 10 20 50 100."""
    capture_topk: Fraction = 0.1
    """K of the pair capture rate."""
    live_firings: PositiveInt = 10
    """Held-out tokens on which a latent must fire to take part in the pair capture rate."""
    joint_firings: PositiveInt = 5
    """Held-out tokens on which both latents of a co-firing pair must fire."""
    loss_tokens: Annotated[int, Field(ge=0)] = 8192
    """Held-out tokens on which the model's loss with an SAE spliced in is measured. Takes the whole model; 0 leaves it."""

    @model_validator(mode="after")
    def _known_to_sae_bench(self) -> Self:
        unknown = sorted(set(self.k_values) - {1, 2, 5, 10, 20, 50, 100})
        if unknown:
            raise ValueError(f"k_values {unknown} are not in sae-bench's output schema (1 2 5 10 20 50 100)")
        return self


class RunConfig(Section):
    """Where the tasks of the Prefect flows run. Nothing here changes a byte of any artefact."""

    engine: Literal["local", "dask"] = "local"
    """`local`: one after the other in the flow's own process. `dask`: ranges of shards, cohorts of SAEs and groups of
    evaluations side by side on Dask's workers, which all see the same workspace."""
    address: str | None = None
    """Dask's scheduler, such as `tcp://127.0.0.1:8786`; without one, a cluster of `workers` processes is started here."""
    workers: PositiveInt = 2
    """Processes of the cluster that is started here."""

    @model_validator(mode="after")
    def _address_of_a_scheduler(self) -> Self:
        if self.address and self.engine != "dask":
            raise ValueError(f'address {self.address} is for engine "dask"; set that, or remove it')
        return self


def _default_probes(validated: dict[str, Any]) -> ProbesConfig:
    return ProbesConfig(datasets=()) if isinstance(validated.get("model"), SyntheticModel) else ProbesConfig()


class Experiment(Section):
    """A whole study."""

    name: str
    """File name without `.toml`; names the report."""
    argument: str
    """What the user called it on the command line, name or path: the commands in messages repeat it."""
    description: str
    """What the study asks, in a sentence or two, shown on the report."""
    model: ModelConfig
    corpus: CorpusConfig
    store: StoreConfig
    probes: ProbesConfig = Field(default_factory=_default_probes)
    train: TrainConfig
    arms: dict[str, ArmConfig] = Field(default_factory=dict)
    """Arms beside the built-in ones, by name; `study.arms` says which of all are trained."""
    study: StudyConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    run: RunConfig = RunConfig()

    @classmethod
    def load(cls, name_or_path: str) -> Self:
        """Read and validate an experiment: a name in `experiments/`, or the path of a TOML file.

        Raises BadInputError, in one line that names the field and the value.
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
            declared: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadInputError(f"{path} is not valid TOML: {error}") from None
        for key in ("name", "argument"):
            if key in declared:
                raise BadInputError(f"{path}: remove the key `{key}`, the file name is the experiment's name")
        try:
            # As JSON, whose numbers, texts and truth values pydantic can keep apart while it still takes a list for a tuple.
            said = json.dumps(declared | {"name": path.stem, "argument": name_or_path}, default=str)
            return cls.model_validate_json(said, strict=True)
        except ValidationError as error:
            raise BadInputError(f"{path}: {explain(error)}") from None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"experiment name {self.name!r} must be lower-case letters, digits, '.', '_' or '-'")
        synthetic = isinstance(self.model, SyntheticModel)
        if synthetic != isinstance(self.corpus, SyntheticCorpus):
            raise ValueError(
                f'model.source "{self.model.source}" and corpus.source "{self.corpus.source}" do not go together: '
                f'either both are "synthetic" or neither is'
            )
        if synthetic and self.probes.datasets:
            raise ValueError("probes.datasets: a synthetic model reads no texts; remove the section [probes]")
        if synthetic and self.store.max_norm:
            raise ValueError("store.max_norm: a synthetic model has no massive rows; remove it")
        if not synthetic and not self.probes.datasets:
            raise ValueError("probes.datasets is empty, which only a synthetic model may have; name at least one data set")
        if max(self.store.layers) >= self.model.depth:
            deepest, last = max(self.store.layers), self.model.depth - 1
            raise ValueError(f"store.layers: layer {deepest} does not exist, the model has layers 0 to {last}")
        shards = -(-self.store.tokens // self.store.shard_rows)
        if self.train.heldout_shards >= shards:
            raise ValueError(
                f"train.heldout_shards {self.train.heldout_shards} leaves nothing to train on: {self.store.tokens:,} tokens "
                f"fill {shards} shards of {self.store.shard_rows:,} rows; use more tokens or smaller shards"
            )
        # At most: a corpus may be shorter, and rows may be left out.
        rows = (shards - self.train.heldout_shards) * self.store.shard_rows
        if self.train.batch_size > rows:
            raise ValueError(
                f"train.batch_size {self.train.batch_size:,} is more than the {rows:,} rows to train on; lower it"
            )
        for layer in self.study.layers:
            if layer not in self.store.layers:
                raise ValueError(f"study.layers: layer {layer} is not among store.layers {list(self.store.layers)}")
        for field in ("layers", "arms", "seeds"):
            values = getattr(self.study, field)
            if len(set(values)) != len(values):
                raise ValueError(f"study.{field} {list(values)} names a value twice")
        if max(self.evaluate.k_values) > self.train.d_sae:
            raise ValueError(f"evaluate.k_values: {max(self.evaluate.k_values)} exceeds train.d_sae {self.train.d_sae}")
        check(self.study.arms, self.train, self.arms)
        return self


def available() -> list[str]:
    """Names of the experiments beside the current folder."""
    return sorted(path.stem for path in EXPERIMENTS.glob("*.toml"))
