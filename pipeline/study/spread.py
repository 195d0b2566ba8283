"""Predicts what a study takes on several GPUs: time by stage, tasks, memory, disk and requests. Arithmetic only.

Work is that of one H100 (`pipeline.study.gpu_hours`), cut as the flows cut it (`pipeline.study.cutting`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from rich.filesize import decimal
from rich.table import Table

from pipeline.models.model_section import KnownFeatures
from pipeline.store.format import ROW_FIELDS
from pipeline.study import gpu_hours
from pipeline.study.cutting import last_end, part_sizes, pieces, streams
from pipeline.study.gpu_hours import (
    BANDWIDTH,
    BATCHES,
    CORES,
    EXACT,
    FORWARD,
    RATES,
    REACHED,
    STORED,
    TRIES,
    WEIGHTS_PER_LAYER,
    WRITERS,
    Evaluating,
    duration,
    training_seconds,
)
from pipeline.study.plan import Plan
from pipeline.study.planned import TrainedSAE

MEASURED, EFFICIENCY = 8, 0.87
"""So many workers, and their efficiency with a model that sleeps, on busy cores (docs/performance.md, "Spreading")."""
TOKENIZED, PACKED = 1.35, 0.10
"""Core-seconds of a million tokens, measured: of the tokenizer's library, which takes all cores, and of one core."""


@dataclass(frozen=True)
class Stage:
    """A stage on several GPUs."""

    name: str
    work: float
    """GPU-seconds."""
    wall: float
    """Seconds to its end."""
    tasks: int
    longest: float
    """Seconds of its longest task."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """What a study takes on so many GPUs."""

    workers: int
    stages: tuple[Stage, ...]
    """In their order; each begins when the one before has ended."""
    card: int
    """Bytes of a card's memory, for the SAEs that the largest piece of training has."""
    host: int
    """Bytes of memory of a worker that extracts, for rows on their way to the store. The model comes on top."""
    disk: int
    bandwidth: float
    """Bytes a second that all workers together write while they extract."""
    requests: dict[str, int]
    """To an object store, by stage."""

    @property
    def wall(self) -> float:
        """Seconds from nothing to the last evaluation."""
        return sum(stage.wall for stage in self.stages)


def spread(plan: Plan, workers: int) -> Spread:
    """What a study takes on so many GPUs of their own machines, from nothing."""
    experiment, one = plan.experiment, gpu_hours.predict(plan)
    store, D, F = experiment.store, experiment.model.d_in, experiment.train.d_sae
    efficiency = EFFICIENCY if workers > 1 else 1.0
    shards = -(-store.tokens // store.shard_rows) + -(-gpu_hours.probe_texts(plan)[1] // store.shard_rows)
    parts = part_sizes(shards, workers)
    layers, evaluating = experiment.study.layers, Evaluating.of(plan)
    # SAEs that are matched to others begin when those have ended.
    rounds = [[sae for sae in plan.to_train if (sae.matched_to is not None) == matched] for matched in (False, True)]
    cohorts = [pieces(streams(saes), workers, partial(training_seconds, d_in=D)) for saes in rounds]
    groups = pieces([[sae for sae in plan.saes if sae.layer == layer] for layer in layers], workers, evaluating.seconds)

    def stage(name: str, *rounds: list[float]) -> Stage:
        tasks = [seconds for each in rounds for seconds in each]
        wall = sum(last_end(each, workers) for each in rounds) / efficiency
        return Stage(name, sum(tasks), wall, len(tasks), max(tasks, default=0.0))

    text = 0.0 if isinstance(experiment.model, KnownFeatures) else store.tokens / 1e6 * (TOKENIZED / CORES + PACKED)
    shard_bytes = store.shard_rows * 2 * D
    extract = stage("extract", [one.extract * size / shards for size in parts])
    return Spread(
        workers=workers,
        stages=(
            Stage("tokenize", text, text, 1, text),
            extract,
            stage("train", *([training_seconds(cohort, D) for cohort in each] for each in cohorts)),
            stage("evaluate", [evaluating.seconds(group) for group in groups]),
        ),
        card=max((len(cohort) for each in cohorts for cohort in each), default=0) * 3 * 8 * D * F
        + gpu_hours.step_bytes(D, F),
        host=2 * (WRITERS + 1) * len(store.layers) * shard_bytes,
        disk=int(one.disk),
        bandwidth=one.disk / extract.wall,
        requests={
            # Of each shard: its layers and row fields, its commit, and whether it is committed. Its claim takes a few more.
            "extract": shards * (len(store.layers) + len(ROW_FIELDS) + 2),
            # Every cohort reads its batches anew, a chunk by a request.
            "train": sum(_chunks(_batches(cohort), plan) for each in cohorts for cohort in each),
            "evaluate": len(groups) * _chunks(evaluating.rows, plan),
        },
    )


def _batches(cohort: Sequence[TrainedSAE]) -> int:
    """Rows of the longest training in a cohort."""
    return max((TRIES if sae.matched_to else 1) * sae.recipe.steps * sae.recipe.batch_size for sae in cohort)


def _chunks(rows: int, plan: Plan) -> int:
    """Requests by which so many rows are read: a chunk each, and the index of each shard."""
    store = plan.experiment.store
    return -(-rows // store.chunk_rows) + -(-rows // store.shard_rows)


def describe(plan: Plan, workers: int) -> tuple[Table, list[str]]:
    """A table of the stages, and what stands below it."""
    found, device = spread(plan, workers), "GPU" if workers == 1 else "GPUs"
    table = Table(title=f"{plan.experiment.name} on {workers:,} {device}: predicted, not measured", title_justify="left")
    for column in ("stage", "GPU-hours", "takes", "ends after", "tasks", "longest task"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    ends = accumulate(stage.wall for stage in found.stages)
    for stage, end in zip(found.stages, ends, strict=True):
        of_cards = "" if stage.name == "tokenize" else f"{stage.work / 3600:,.1f}"
        table.add_row(stage.name, of_cards, duration(stage.wall), duration(end), f"{stage.tasks:,}", duration(stage.longest))
    return table, _below(plan, found)


def _below(plan: Plan, found: Spread) -> list[str]:
    model = plan.experiment.model
    weights = 2 * WEIGHTS_PER_LAYER * model.d_in**2 * (max(plan.experiment.store.layers) + 1)
    asked = ", ".join(f"{name} {number:,}" for name, number in found.requests.items())
    beyond = "" if found.workers <= MEASURED else "; more were not measured"
    return [
        f"all of it    {duration(found.wall)}: each stage begins when the one before has ended; starting workers",
        "             and opening models, a minute or so each time, is not in it",
        f"disk         {decimal(found.disk)}, which all workers together write at {decimal(int(found.bandwidth))}/s",
        f"memory       {decimal(found.card)} of a card for the SAEs of the largest cohort; extracting takes",
        f"             {decimal(found.host)} of a worker for rows, and {decimal(weights)} of its card beside embeddings",
        f"requests     to an object store, about: {asked}",
        f"efficiency   {EFFICIENCY:.0%} of several workers, as measured with {MEASURED} and a model that sleeps, on busy",
        f"             cores{beyond}",
        f"rates        of one H100 beside {CORES} cores, measured unless it says assumed (docs/performance.md):",
        *(f"             {what}: {rate}" for what, rate in _rates(plan).items()),
    ]


def _rates(plan: Plan) -> dict[str, str]:
    precision = plan.experiment.train.precision
    return {
        "training": f"{RATES[precision] / 1e12:.0f} TFLOP/s in {precision}, of which steps reach {REACHED:.0%}",
        "the model": f"{RATES['bfloat16'] / 1e12:.0f} TFLOP/s, of which its forward pass is assumed to reach {FORWARD:.0%}",
        "evaluation": f"{EXACT / 1e12:.0f} TFLOP/s in float32",
        "the card's memory": f"{BANDWIDTH / 1e12:.1f} TB/s",
        "files": f"{STORED / 1e9:.0f} GB/s for each of {WRITERS} writers, and for reading held-out rows and probe texts",
        "batches": f"{BATCHES / 1e9:.1f} GB/s to an SAE alone",
        "text, on one machine": f"{TOKENIZED} core-seconds a million tokens on all cores, and {PACKED} on one",
    }
