"""Predicts what a whole study takes on one GPU: time by stage, memory and disk. Arithmetic only; nothing is measured here.

Local shapes, in formulas: D d_in, F d_sae, B rows of a batch, R held-out rows, P rows of probe texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from rich.filesize import decimal

from pipeline.models.model_section import KnownFeatures
from pipeline.sae.activation import ClosedForm
from pipeline.sae.activations import ACTIVATIONS
from pipeline.study.cutting import streams
from pipeline.study.experiment import Experiment
from pipeline.study.penalties import Contrast
from pipeline.study.plan import Plan
from pipeline.study.planned import PlannedSAE, TrainedSAE
from pipeline.study.recipe import TrainConfig
from pipeline.study.saebench_section import SAEBENCH

BANDWIDTH = 2.9e12
"""Bytes a second that one H100 moved (docs/performance.md)."""
RATES = {"bfloat16": 757e12, "float32": 399e12}
"""FLOP/s of products in training, as measured on that card: float32 is rounded to TF32."""
EXACT = 51e12
"""FLOP/s of products in float32, in which SAEs are evaluated, as measured there."""
REACHED = 0.8
"""Share of those rates that whole training steps reached there."""
NOT_COMPILED = 2.3
"""How many times as long a step takes that is not compiled, as one with a fixed L0, learned thresholds or something frozen:
measured there without a penalty at 16,384 latents, on ReLU."""
SMALL_KERNELS = 8e-5
"""Seconds of the many small kernels of a step, as measured there: what the largest widths hide."""
CORES = 16
"""Processor cores beside the card."""
FORWARD = 0.4
"""Share of the rate that a language model's forward pass reaches."""
WEIGHTS_PER_LAYER = 12
"""Weights of a transformer layer as a multiple of d_in^2: the usual rule of thumb, within a third for Gemma-2."""
STORED = 1e9
"""Bytes a second and core that extraction writes, and that evaluation reads and pads, after benchmarks/reading.py."""
WRITERS = 3
DRAWN = 1.3e7
"""Features of a synthetic model that are drawn a second on one core, whether they fire or not: measured at 16,384."""
MOST_CLASSES = 5
"""Classes of the largest probe data set."""
PROBE_SECONDS, PROBE_SECONDS_A_LATENT, PROBE_TEXTS = 8.7, 0.0049, 90_000
"""Core-seconds of one SAE's probes on eight data sets of together so many texts: measured at 2,304 and 16,384 latents, with
one draw. Further draws repeat the sparse probes, which are about the part that does not grow with latents."""
PROBED_TOGETHER = 64
"""SAEs for which a card reads the probe texts once (`pipeline.evaluate.tasks`)."""
BATCHES = 3.8e9
"""Bytes a second of batches that one stream gives to an SAE alone, as measured on that card: 2.5 ms for 2,048 x 2,304."""
TRIES = 4
"""Trainings of an arm that is matched to another's L0, as is usual."""
UPPER = 0.56
"""Share of F x F that pairs are counted in (`pipeline.evaluate.sparse`)."""

PLAIN, CONTRASTED = (40, 12, 14, 0), (42, 20, 9, 4.6)
"""Bytes that a step moves beside its products, for each entry of D x F, B x F, B x D and F x F: without a penalty, and with
the contrast. Fitted to the kernels that tests/gpu counts; a step is within a fifth of them."""
HALVED, PART = 8192, 5 / 8
"""Latents from which on the contrast takes a part of F x F twice (`train/pair_dense.py`)."""


def step_seconds(recipe: TrainConfig, d_in: int) -> float:
    """Predicted seconds of a training step, thresholds included. A penalty of another kind counts as the contrast."""
    plain = _seconds(recipe, d_in, None)
    section = recipe.only_penalty
    if section is None:
        return plain
    contrast = section if isinstance(section, Contrast) else Contrast()
    return plain + (_seconds(recipe, d_in, contrast) - plain) / section.every


def _seconds(recipe: TrainConfig, d_in: int, contrast: Contrast | None) -> float:
    D, F, B = d_in, recipe.d_sae, recipe.batch_size
    sizes = (D * F, B * F, B * D, F * F)
    moved = sum(size * factor for size, factor in zip(sizes, CONTRASTED if contrast else PLAIN, strict=True))
    products = 6 - recipe.prefixes[0] / F if recipe.prefixes else 5  # all prefixes but the first are decoded once more
    activation = ACTIVATIONS[recipe.activation]
    precision = recipe.precision if isinstance(activation, ClosedForm) else "float32"
    seconds = moved / BANDWIDTH + products * 2 * B * D * F / RATES[precision]
    if contrast:
        part = PART if F >= HALVED else 1.0
        dense = 2 * F * F * (D + (part + 1) * B * contrast.weighted)
        seconds += part * 2 * F * F * D / RATES["float32"] + dense / RATES[contrast.precision]
        seconds += (40 * F * F / BANDWIDTH + 2 * F * F * D / RATES["float32"]) / contrast.pair_refresh
    compiled = isinstance(activation, ClosedForm) and activation.compiles and not recipe.frozen
    return (seconds / REACHED + SMALL_KERNELS) * (1 if compiled else NOT_COMPILED)


@dataclass(frozen=True)
class Prediction:
    """Seconds by stage, and bytes."""

    extract: float
    train: float
    evaluate: float
    memory: float
    """Of the card, for the SAEs of a layer trained together."""
    disk: float
    """Of stores, what is streamed at a time, probe stores and SAEs."""

    @property
    def hours(self) -> float:
        """Of the whole study."""
        return (self.extract + self.train + self.evaluate) / 3600


def training_seconds(saes: Sequence[TrainedSAE], d_in: int) -> float:
    """Predicted seconds of SAEs that are trained together: of their steps, or of reading their batches if that is slower."""
    trainings = [(TRIES if sae.matched_to else 1, sae.recipe) for sae in saes]
    reading = max(tries * recipe.steps * recipe.batch_size for tries, recipe in trainings) * 2 * d_in / BATCHES
    return max(reading, sum(tries * recipe.steps * step_seconds(recipe, d_in) for tries, recipe in trainings))


@dataclass(frozen=True)
class Evaluating:
    """Predicted seconds of evaluating SAEs of one layer."""

    heldout: float
    """To read the held-out rows, once for all SAEs."""
    rows: int
    """Rows that are read: held out, and of probe texts."""
    texts: float
    """To read the probe texts, once for PROBED_TOGETHER SAEs."""
    each: float
    """Of every SAE, with its random SAEs."""
    baseline: float
    """Of every SAE of the arm `baseline` that others are measured beside, once for all of them."""

    @classmethod
    def of(cls, plan: Plan) -> Self:
        """What SAEs of this study take."""
        experiment = plan.experiment
        D, F, nulls = experiment.model.d_in, experiment.train.d_sae, experiment.evaluate.null_draws
        R, (texts, P) = experiment.train.heldout_shards * experiment.store.shard_rows, probe_texts(plan)
        encode, pairs = 2 * R * D * F, 2 * UPPER * 2 * R * F**2  # whether and how strongly latents fire together
        # A random SAE's rows are encoded to find its threshold, and again with it. Latents are moved as they are encoded.
        own = 2 * encode + pairs + nulls * (2 * encode + pairs) + 2 * P * D * F
        moved = 24 * R * F * (1 + 2 * nulls) + 48 * P * F
        probes = PROBE_SECONDS * max(1, experiment.evaluate.probe_draws) + PROBE_SECONDS_A_LATENT * F
        return cls(
            rows=R + P,
            heldout=R * 2 * D / STORED,
            texts=P * 2 * D / STORED,
            each=own / EXACT + moved / BANDWIDTH + probes * texts / PROBE_TEXTS / CORES,
            baseline=(2 * encode + pairs) / EXACT + 24 * R * F / BANDWIDTH,
        )

    def seconds(self, saes: Sequence[PlannedSAE]) -> float:
        """Of these SAEs, evaluated together."""
        reading = self.heldout + self.texts * -(-len(saes) // PROBED_TOGETHER)
        baselines = {sae.baseline.path for sae in saes if sae.baseline}
        return reading + len(saes) * self.each + len(baselines) * self.baseline


def probe_texts(plan: Plan) -> tuple[int, int]:
    """Texts of all probe data sets, and their rows, at most."""
    probes = plan.experiment.probes
    texts = len(plan.probes) * MOST_CLASSES * (probes.train_size + probes.test_size) // 2
    return texts, texts * (probes.context - 1)


def step_bytes(d_in: int, d_sae: int) -> int:
    """Bytes of a card's memory that the steps of all SAEs share: gradients, and four matrices of pairs."""
    return 2 * 4 * 2 * d_in * d_sae + 4 * 4 * d_sae**2


@dataclass(frozen=True)
class Rows:
    """How many rows of its store a study makes, where and when."""

    kept: int
    """That extraction makes."""
    streamed: int
    """That are made while training, for each group of SAEs that trains together."""
    ring: int
    """That lie on disk meanwhile, at most."""


def rows_of(experiment: Experiment) -> Rows:
    """The rows of a stream; a store that keeps all has no others."""
    store, recipe = experiment.store, experiment.train
    if store.mode == "keep" or recipe.window_shards is None:
        return Rows(kept=store.tokens, streamed=0, ring=0)
    training = -(-store.tokens // store.shard_rows) - recipe.heldout_shards
    window = min(recipe.window_shards, training)
    made = recipe.steps * recipe.batch_size * (training - window) // training
    kept = min(store.tokens, (window + recipe.heldout_shards) * store.shard_rows)
    return Rows(kept=kept, streamed=made, ring=min(2 * window, training - window) * store.shard_rows)


def predict(plan: Plan) -> Prediction:
    """What the study takes on one H100 from nothing to its report."""
    experiment = plan.experiment
    store, D, F = experiment.store, experiment.model.d_in, experiment.train.d_sae
    _, P = probe_texts(plan)
    rows = rows_of(experiment)
    if isinstance(experiment.model, KnownFeatures):
        each_row = experiment.model.features / (DRAWN * CORES)
    else:
        each_row = 2 * WEIGHTS_PER_LAYER * D**2 * (max(store.layers) + 1) / (RATES["bfloat16"] * FORWARD)
    row_bytes = 2 * D * len(store.layers)
    stored = (rows.kept + P) * row_bytes
    layers = [[sae for sae in plan.saes if sae.layer == layer] for layer in experiment.study.layers]
    trained = streams(plan.to_train)
    tries = sum(TRIES if together[0].matched_to else 1 for together in trained)
    sae_bytes = 4 * 2 * D * F
    return Prediction(
        extract=max((rows.kept + P) * each_row, stored / (STORED * WRITERS)),
        train=sum(training_seconds(together, D) for together in trained) + tries * rows.streamed * each_row,
        evaluate=sum(Evaluating.of(plan).seconds(layer) for layer in layers),
        memory=max(map(len, trained), default=0) * 3 * sae_bytes + step_bytes(D, F),
        disk=stored + rows.ring * row_bytes + len(plan.saes) * sae_bytes,
    )


def describe(plan: Plan) -> str:
    """A few lines for `dasae ablate --dry-run`."""
    found, asked = predict(plan), plan.experiment.evaluate.saebench
    known = {name: SAEBENCH[name].minutes for name in asked}
    minutes = ", ".join(f"{name} {took or 'not known'}" for name, took in known.items())
    return "\n".join([
        f"  whole study  predicted for one H100 and {CORES} cores, not measured:",
        f"               extract {duration(found.extract)}, train {len(plan.to_train)} SAEs {duration(found.train)}, "
        f"evaluate {len(plan.saes)} {duration(found.evaluate)}: {found.hours:.1f} GPU-hours",
        f"               {decimal(int(found.memory))} of the card's memory for the SAEs of a layer, "
        f"{decimal(int(found.disk))} of disk",
        *([f"               without sae-bench's own, minutes an SAE on an RTX 3090: {minutes}"] if asked else []),
    ])  # fmt: skip


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
