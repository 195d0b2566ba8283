"""Defines the sections [store], [study], [worth], [evaluate] and [run], and turns pydantic's errors into one line.

The other sections are in `pipeline.models.model_section` ([model]), `pipeline.texts.text_sections` ([corpus], [probes]),
`pipeline.study.recipe` ([train], [arms]), `pipeline.study.penalties` ([train.contrast], [train.penalty]) and
`pipeline.study.saebench_section` ([saebench]).
`pipeline.study.experiment` combines all of them.
"""

import re
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, ValidationError, model_validator

from pipeline.section import Before, Dtype, Fraction, PositiveInt, Section, Seed, one_of
from pipeline.store.codecs import Codec
from pipeline.store.limits import MOST_SHARDS
from pipeline.study.saebench_section import SAEBENCH


class StoreConfig(Section):
    """What is extracted, and how it is stored."""

    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    """Layers after which the residual stream is stored (0 is the first). One forward pass serves all of them."""
    tokens: PositiveInt
    """Rows to store, one for each token of text; special tokens do not count."""
    context: Annotated[int, Field(ge=8)] = 128
    """Tokens per sequence, the leading BOS included."""
    forward_batch: PositiveInt = 32
    """Sequences per forward pass. Part of the store's key: matrix kernels round differently for other shapes."""
    dtype: Dtype = "bfloat16"
    """Dtype of the stored rows."""
    codec: Codec = "raw"
    """`raw` for local disks; `blosc` (zstd-1, byte shuffle) for storage slower than about 370 MB/s per core."""
    shard_rows: PositiveInt = 32768
    """Rows per file, the unit of writing, committing and resuming."""
    chunk_rows: PositiveInt = 1024
    """Rows per chunk, the unit of reading. On an object store, set this and `shard_rows` to 8192: one GET per read."""
    max_norm: Annotated[float, Field(gt=1)] | None = None
    """Leave out rows whose norm exceeds this multiple of the shard's median norm, such as attention sinks other than BOS."""
    seed: Seed = 0
    """Seed of the row order inside each shard; with a synthetic model, of the rows themselves."""
    mode: Annotated[Literal["keep", "stream"], Before("keep")] = "keep"
    """`keep`: extraction makes all shards. `stream`: it makes those that are held out and the first `train.window_shards`;
    training makes the others while it reads, on every pass again."""

    @model_validator(mode="after")
    def _whole_chunks(self) -> Self:
        if self.shard_rows % self.chunk_rows:
            raise ValueError(f"shard_rows {self.shard_rows} is not a multiple of chunk_rows {self.chunk_rows}")
        if self.tokens > self.shard_rows * MOST_SHARDS:
            raise ValueError(f"tokens {self.tokens:,} are more than {MOST_SHARDS:,} shards hold; raise shard_rows")
        if len(set(self.layers)) != len(self.layers):
            raise ValueError(f"layers {list(self.layers)} names a layer twice")
        if self.mode == "stream" and self.max_norm:
            raise ValueError(
                'max_norm decides only once a shard is made how many rows it has, and mode "stream" must know; '
                'use mode "keep", or remove max_norm'
            )
        return self


FEWEST_LEVELS = 3
"""Of two, nobody could say how far a frontier bends between them."""


class StudyConfig(Section):
    """Which SAEs are trained and compared: every arm x seed x layer, and x sparsity where there are several."""

    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    """Layers of the store on which SAEs are trained."""
    arms: Annotated[tuple[str, ...], Field(min_length=1)]
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    sparsities: tuple[PositiveFloat, ...] = ()
    """At least three L0 that rise. Every arm is trained at each, as its `k` or `l0_target`, and arms are compared at equal
    L0 along these frontiers."""

    @model_validator(mode="after")
    def _a_frontier(self) -> Self:
        levels = self.sparsities
        if levels and (len(levels) < FEWEST_LEVELS or sorted(set(levels)) != list(levels)):
            shown = ", ".join(f"{level:g}" for level in levels)
            raise ValueError(f"sparsities {shown}: a frontier takes at least {FEWEST_LEVELS} L0 that rise")
        return self


class Worth(Section):
    """The difference between two arms that would matter, in each metric by which they are compared.

    The report calls a difference larger or smaller than it, and two arms equal where it is certainly smaller.
    """

    fvu: PositiveFloat = 0.01
    sparse_probing: PositiveFloat = 0.01
    """In test accuracy, with any number of latents."""
    interference: PositiveFloat = 0.02
    """On an SAE's own pairs, as a share of its reconstruction."""
    true_features: PositiveFloat = 0.01
    """Of a synthetic model: share of its features found, and MCC and F1 of latents."""
    absorption: PositiveFloat = 0.01
    """Share of a synthetic model's parents that are silent beside their child."""


class EvaluateConfig(Section):
    """How finished SAEs are evaluated."""

    k_values: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 2, 5, 10, 20, 50)
    """Numbers of latents that a sparse probe may use, among those of sae-bench's output schema: 1 2 5 10 20 50 100."""
    probe_draws: Annotated[int, Field(ge=0, le=100), Before(0)] = 3
    """Draws of the problem of every sparse probe; its score is their mean. All SAEs are given the same problems. 0 takes
    sae-bench's own order of random numbers, in which every SAE gets other problems, to reproduce its numbers."""
    capture_topk: Fraction = 0.1
    """K of the pair capture rate."""
    null_draws: Annotated[int, Field(ge=2, le=100)] = 3
    """Random SAEs beside which the pair capture rate of an SAE is shown: their mean and their spread."""
    live_firings: PositiveInt = 10
    """Held-out tokens on which a latent must fire to count in the pair capture rate."""
    joint_firings: PositiveInt = 5
    """Held-out tokens on which both latents of a co-firing pair must fire."""
    loss_tokens: Annotated[int, Field(ge=0)] = 8192
    """Held-out tokens for the model's loss with an SAE spliced in. It needs the whole model; 0 skips it."""
    saebench: tuple[Annotated[str, AfterValidator(one_of(SAEBENCH))], ...] = ()
    """Further evaluations of sae-bench, with their settings in [saebench]: core, scr, tpp, absorption, meta_structure,
    sparse_probing_sae_probes, ravel, unlearning, autointerp. Each has artefacts of its own, so one can be added later."""

    @model_validator(mode="after")
    def _known_to_sae_bench(self) -> Self:
        unknown = sorted(set(self.k_values) - {1, 2, 5, 10, 20, 50, 100})
        if unknown:
            raise ValueError(f"k_values {unknown} are not in sae-bench's output schema (1 2 5 10 20 50 100)")
        return self


class RunConfig(Section):
    """Where the tasks of the Prefect flows run. Nothing here changes an artefact."""

    engine: Literal["local", "dask"] = "local"
    """`local`: one task after the other in the flow's process. `dask`: ranges of shards, cohorts of SAEs and groups of
    evaluations in parallel on Dask's workers, which all see the same workspace."""
    address: str | None = None
    """Dask's scheduler, such as `tcp://127.0.0.1:8786`. Without one, the flow starts `workers` processes on its machine."""
    workers: PositiveInt = 2
    """Processes that the flow starts."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """Where tensors are computed: `auto` takes a GPU if there is one. DASAE_DEVICE overrules it."""

    @model_validator(mode="after")
    def _address_of_a_scheduler(self) -> Self:
        if self.address and self.engine != "dask":
            raise ValueError(f'address {self.address} is for engine "dask"; set that, or remove it')
        return self


TAGGED = ("model", "corpus")
"""Sections whose `source` says which class validates them. pydantic then puts the source into an error's location."""
TAGGED_FIELDS = (*TAGGED, "firing_probability", "mean_firing_magnitudes", "std_firing_magnitudes", "branching_factor")
"""These, and the fields in them that also have several forms."""


def explain(error: ValidationError, where: str = "") -> str:
    """A pydantic error in one line: the field (with `where` before it), what is wrong with it, and the value given."""
    problems = error.errors(include_url=False)
    # A misspelt key also makes the right one missing; the misspelling is the error to report.
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    # Values of `source` are no keys of the TOML file: "tiny" in ("model", "tiny", "steps"), "mixture" and "files" in
    # ("corpus", "mixture", "parts", 0, "files", "paths").
    place = first["loc"]
    tagged = TAGGED_FIELDS if place and place[0] in TAGGED else ()
    pairs = zip(("", *place), place, strict=False)
    path = [str(part) for before, part in pairs if before not in tagged and not (tagged and isinstance(before, int))]
    field = ".".join([where, *path] if where else path)
    kind, given, context = first["type"], first["input"], first.get("ctx", {})
    # Python says tuple, JSON says array; in TOML it is a list.
    message = re.sub("tuple|array", "list", first["msg"].removeprefix("Value error, "), flags=re.IGNORECASE)
    if kind == "extra_forbidden":
        message = "unknown key, check its spelling or remove it"
    elif kind == "union_tag_not_found":
        message = f"{context['discriminator']} is missing; it says which kind this is"
    elif kind == "union_tag_invalid":
        tag = context["discriminator"].strip("'")
        message = f"{tag} should be one of {context['expected_tags']}"
        given = given[tag]
    shown = "" if kind in ("missing", "value_error", "extra_forbidden", "union_tag_not_found") else f", got {given!r}"
    return f"{field + ': ' if field else ''}{message[0].lower()}{message[1:]}{shown}"
