"""Defines the results of a study as frozen typed data: results.json is a dump of `Results`, which also reads it back.

Numbers that only the table of metrics names (`metrics.METRICS`) are extra fields, so that a new one needs no field here.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from pydantic import BaseModel, Field, JsonValue

from pipeline.report.latents import Browsing, Examples, ExamplesOf, Separated, SeparatedOf
from pipeline.report.record import Frozen
from pipeline.study.recipe import TrainConfig
from pipeline.study.reports import MadeOf
from pipeline.study.sections import Worth

Number = int | float
"""As the file has it: pydantic keeps an int an int in this union."""


class Numbers(Frozen, extra="allow"):
    """Numbers by name; None where one is not defined."""

    __pydantic_extra__: dict[str, Number | None]  # pyright: ignore[reportIncompatibleVariableOverride] - so pydantic types them


class Measured(Numbers):
    """Numbers by name, and why some of them are None."""

    reason: str | None = None


class Histogram(Frozen):
    """`counts` [m] between `edges` [m + 1]."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


class Density(Histogram):
    """Latents by log10 of the share of rows on which they fire; `dead` of them never do."""

    dead: int


class CapturePoint(Frozen):
    """Pair capture (union) at one place of a curve, beside both nulls."""

    union: float | None
    chance: float | None
    random_tied: float | None


class MaskPoint(CapturePoint):
    """A point of the curve over the size of the mask."""

    topk: float


class PairsPoint(CapturePoint):
    """A point of the curve over the number of pairs, `q` per live latent."""

    q: float


class Capture(Measured):
    """Pair capture rates, and the curves around the K and q of the study."""

    by_topk: tuple[MaskPoint, ...]
    by_pairs: tuple[PairsPoint, ...]


class Interference(Frozen):
    """Interference on an SAE's own pairs, on those of its baseline (`fixed`), and of both on those of either (`both`)."""

    own: Numbers | None
    fixed: Numbers | None
    both: Numbers | None
    reason: str | None


class PlantedPairs(Frozen):
    """Capture of planted pairs by kind, and the share of all pairs of live latents that the mask holds."""

    correlated: Measured
    parent_child: Measured
    all: Measured
    chance: float | None


class Recovered(Frozen):
    """Which of a synthetic model's features an SAE recovered: the content of `ground_truth.json`."""

    rows: int
    features: dict[str, Measured]
    absorption: Measured
    pairs: PlantedPairs
    false_capture: Measured


Accuracies = dict[str, float]
"""Probing accuracy by the number of latents that a probe reads, and `all`."""


class Row(Frozen, extra="allow"):
    """One evaluated SAE. A field is None where the SAE is degenerate or the study does not measure it."""

    __pydantic_extra__: dict[str, JsonValue]  # pyright: ignore[reportIncompatibleVariableOverride] - so pydantic types them

    arm: str
    seed: int
    layer: int
    sparsity: float | None = None
    """The L0 that it was trained at, in a study with frontiers."""
    backbone: str | None = None
    """Activation, and whether there are prefixes; the architecture of an SAE that was not trained here."""
    penalty: str | None = None
    steps: int | None = None
    """This and the next three are None for an SAE that was not trained here."""
    tokens: int | None = None
    resets: int | None = None
    seconds: float | None = None
    sae: str
    """Key of the SAE's artefact."""
    degenerate: str | None
    """Why there is nothing to measure."""
    fvu: float | None = None
    cosine: float | None = None
    l0: float | None = None
    dead_fraction: float | None = None
    max_decoder_cosine: float | None = None
    density: Density | None = None
    decoder_cosine: Histogram | None = None
    loss: Measured | None = None
    geometry: Numbers | None = None
    stability: Measured | None = None
    interference: Interference | None = None
    sparse_probing: Accuracies | None = None
    llm_probing: Accuracies | None = None
    """The same probes on the model's own activations."""
    sparse_probing_by_task: dict[str, Accuracies] | None = None
    llm_probing_by_task: dict[str, Accuracies] | None = None
    probe_texts: dict[str, dict[str, str]] | None = Field(default=None, exclude=True)
    """By task and number of latents what each test text adds to the accuracy, as text (docs/evaluation-files.md)."""
    bpcr: Capture | None = None
    ground_truth: Recovered | None = None
    synth_sae_bench: Numbers | None = None
    examples: Examples | None = Field(default=None, exclude=True)
    """Shown of a few SAEs only, under `Results.examples`."""
    separated: Separated | None = Field(default=None, exclude=True)
    """Under `Results.separated`, which has the texts of a few SAEs only."""
    browsing: Browsing | None = Field(default=None, exclude=True)
    """On the page only: with the texts, results.json would be many times as large."""

    def at(self, path: tuple[str, ...]) -> Any:
        """The value at a path of field names; None where a part of it is None or missing."""
        value: Any = self
        for key in path:
            value = _part(value, key)
        return value


def model_accuracies(rows: Iterable[Row]) -> Accuracies | None:
    """The model's own probing accuracy, which all rows of a layer repeat; None where it was not measured."""
    return next((row.llm_probing for row in rows if row.llm_probing), None)


def levels_of(rows: Iterable[Row]) -> list[float]:
    """The L0 that SAEs were trained at, in ascending order; empty without frontiers."""
    return sorted({row.sparsity for row in rows if row.sparsity is not None})


def middle(levels: Sequence[float]) -> float | None:
    """The middle one of ascending numbers, the upper one of two."""
    return levels[len(levels) // 2] if levels else None


def _part(value: Any, key: str) -> Any:
    fields: Mapping[str, Any] = value or {}
    if isinstance(value, BaseModel):
        fields = vars(value) | (value.model_extra or {})
    return fields.get(key)


class Curve(Frozen):
    """The training log of one SAE; None where a step's number was not finite."""

    arm: str
    seed: int
    layer: int
    sparsity: float | None = None
    step: tuple[int, ...]
    fvu: tuple[float | None, ...]
    l0: tuple[float | None, ...]
    dead_fraction: tuple[float | None, ...]


Outcome = Literal["better", "worse", "equal", "undecided", "not judged"]
"""What a planned difference shows, in a word. `Difference.verdict` says it in a sentence."""


class Difference(Frozen):
    """One arm minus another in one metric, over the seeds that both have. The fields are the columns of differences.csv."""

    layer: int
    metric: str
    arm: str
    reference: str
    planned: bool
    better: Literal["higher", "lower"] | None
    seeds: int
    difference: float | None
    sd: float | None
    """Standard deviation of the difference between seeds; pooled over the arms where `spread_ratio` allows it. In probing,
    `text_error` is part of it."""
    df: float | None
    low: float | None
    high: float | None
    p: float | None
    l0_ratio: float | None
    """Mean L0 of the arm over that of the reference, for metrics that improve by themselves when more latents fire. None
    where arms are compared at equal L0 along their frontiers."""
    tasks: int | None
    tasks_higher: int | None
    l0_allowance: float | None = None
    """The largest difference that `l0_ratio` alone could make. p_holm asks whether there is more."""
    interpolation_error: float | None = None
    """How much of the difference depends on the form of the interpolation, mean over seeds."""
    text_error: float | None = None
    """Standard error of a difference in probing that comes from the test texts, whatever the number of seeds."""
    failed: int = 0
    """Degenerate SAEs of the two arms; their seeds are in no difference."""
    spread_ratio: float | None = None
    """Largest over smallest standard deviation of the arms that are tested together; None where each is tested alone."""
    skewed: bool = False
    """Whether seeds stray further to one side in the arms that are tested together: `low` and `high` may be too close."""
    p_holm: float | None = None
    """This and the rest are None unless the difference was planned."""
    family: int | None = None
    """Number of differences that p_holm is corrected for."""
    least: float | None = None
    """The smallest difference that this study would find with probability 0.8, at the level of the page."""
    outcome: Outcome | None = None
    verdict: str | None = None


class Arm(Frozen):
    """One line of the tables: an arm, or the name of SAEs that others trained."""

    arm: str
    run: int | None
    question: str | None
    """The question that the arm's difference to `base` answers; None for SAEs that others trained, which are in none."""
    base: str | None
    """The arm that it is compared with."""
    matched: bool = False
    """Whether its L0 was searched for, by `match_l0`: its seeds also differ by where the search ended."""


class Task(Frozen):
    """A probing task: texts of several classes."""

    name: str
    classes: tuple[str, ...]
    train_size: int
    test_size: int


class Model(Frozen):
    """The model that the rows come from."""

    name: str
    facts: dict[str, JsonValue]


class StoreFacts(Frozen):
    """The activation store that all SAEs were trained from."""

    key: str
    rows: int
    bytes: int
    layers: tuple[int, ...]
    context: int
    d_in: int
    seconds: float
    corpus: str
    remarks: tuple[str, ...] = ()
    """What a reader must know of its rows (`store.norms.massive_rows`)."""


class Training(TrainConfig):
    """The recipe of `full`, and on how many rows every SAE was measured."""

    heldout_rows: int


class Cost(Frozen):
    """Seconds and bytes that the artefacts shown took."""

    model_seconds: float
    extract_seconds: float
    train_seconds: float
    evaluate_seconds: float
    store_bytes: int


class Results(Frozen):
    """Everything that a report shows."""

    experiment: str
    description: str
    generated: str
    """ISO time."""
    version: str
    made_of: MadeOf
    is_demo: bool
    is_synthetic: bool
    model: Model
    reported_llm_probing: Accuracies | None
    """The model's own probing accuracy as the method's log reports it."""
    store: StoreFacts
    tasks: tuple[Task, ...]
    training: Training
    arms: tuple[Arm, ...]
    k_values: tuple[int, ...]
    worth: Worth = Worth()
    """The differences that matter."""
    rows: tuple[Row, ...]
    curves: tuple[Curve, ...]
    missing: tuple[str, ...]
    """SAEs of the study that are not evaluated yet."""
    examples: tuple[ExamplesOf, ...]
    separated: tuple[SeparatedOf, ...] = ()
    """Of every SAE that has a control; pairs are shown of one SAE an arm and layer."""
    cost: Cost
    differences: tuple[Difference, ...] = ()

    @property
    def probe_sizes(self) -> list[str]:
        """The numbers of latents that probes may read, as rows name them."""
        return [*map(str, self.k_values), "all"]

    @property
    def layers(self) -> list[int]:
        """The layers of the evaluated SAEs, in ascending order."""
        return sorted({row.layer for row in self.rows})

    @property
    def seeds(self) -> list[int]:
        """The seeds of the evaluated SAEs, in ascending order."""
        return sorted({row.seed for row in self.rows})

    @property
    def levels(self) -> list[float]:
        """The L0 that arms were trained at, in ascending order; empty without frontiers."""
        return levels_of(self.rows)

    @property
    def shown_level(self) -> float | None:
        """The L0 whose SAEs stand for their arms; None without frontiers."""
        return middle(self.levels)

    @property
    def kinds(self) -> dict[str, tuple[str, str]]:
        """Backbone and penalty of each arm."""
        known = ((row.arm, row.backbone, row.penalty) for row in self.rows)
        return {arm: (backbone, penalty) for arm, backbone, penalty in known if backbone and penalty}

    def of_layer(self, layer: int) -> list[Row]:
        """The SAEs of one layer that stand for their arms: all, or those of one L0, beside those that others trained."""
        return [row for row in self.rows if row.layer == layer and row.sparsity in (None, self.shown_level)]

    def whole_layer(self, layer: int) -> list[Row]:
        """All SAEs of one layer."""
        return [row for row in self.rows if row.layer == layer]
