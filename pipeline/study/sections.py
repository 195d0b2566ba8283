"""The sections [store], [study], [evaluate] and [run] of an experiment, and pydantic's errors in one line.

Rooms below this one own the sections that configure them: `models.model_section`, `texts.text_sections`. `study.recipe` has
[train], `study.experiment` puts all of them together.
"""

import re
from typing import Annotated, Literal, Self, get_args

from pydantic import Field, PositiveInt, ValidationError, model_validator

from pipeline.models.model_section import ModelConfig
from pipeline.section import Dtype, Fraction, Section, Seed
from pipeline.store.codecs import Codec
from pipeline.texts.text_sections import CorpusConfig


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


SOURCES = {
    tag
    for union in (ModelConfig, CorpusConfig)
    for section in get_args(get_args(union)[0])
    for tag in get_args(section.model_fields["source"].annotation)
}
"""Every value of `source`."""


def explain(error: ValidationError, where: str = "") -> str:
    """The first problem of a pydantic error as one line: field (inside `where`), what is wrong, the value given."""
    problems = error.errors(include_url=False)
    # A misspelt key also makes the right one missing: the spelling is what to talk about.
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    # Discriminated unions put the tag into the location; it is no key of the TOML.
    path = [str(part) for part in first["loc"] if part not in SOURCES]
    field = ".".join([where, *path] if where else path)
    kind, given, context = first["type"], first["input"], first.get("ctx", {})
    # What Python has as a tuple and JSON as an array, TOML has as a list.
    message = re.sub("tuple|array", "list", first["msg"].removeprefix("Value error, "), flags=re.IGNORECASE)
    if kind == "extra_forbidden":
        message = "unknown key, check its spelling or remove it"
    elif kind == "union_tag_not_found":
        message = f"{context['discriminator']} is missing, which says what kind it is"
    elif kind == "union_tag_invalid":
        message = "source should be one of " + context["expected_tags"]
        given = given["source"]
    shown = "" if kind in ("missing", "value_error", "extra_forbidden", "union_tag_not_found") else f", got {given!r}"
    return f"{field + ': ' if field else ''}{message[0].lower()}{message[1:]}{shown}"
