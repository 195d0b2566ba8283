"""The metrics of a study: where a row of the results holds each, what it is called, which direction is better."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from pipeline.report.text import count, four, one, percent, three, two

Row = Mapping[str, Any]
Rows = Sequence[Row]
"""Entries of the results' `rows`: one per arm, seed and layer."""
Results = Mapping[str, Any]
"""What a report shows, as plain JSON data."""


class Metric(NamedTuple):
    """One metric: where a row holds it, its heading, its entry in the glossary, how it is written, what is better."""

    path: tuple[str, ...]
    heading: str
    term: str
    show: Callable[[float], str]
    better: Literal["higher", "lower"] | None = None

    @property
    def name(self) -> str:
        """Its name in results.csv and in comparisons."""
        return "_".join(self.path)


FVU = Metric(("fvu",), "FVU", "fvu", three, "lower")
L0 = Metric(("l0",), "L0", "l0", one)
RECOVERED = Metric(("loss", "recovered_zero"), "loss", "recovered", three, "higher")
DEAD = Metric(("dead_fraction",), "dead", "dead", percent, "lower")
RESETS = Metric(("resets",), "resets", "resets", count)
UNION = Metric(("bpcr", "union"), "union", "bpcr", three)
CHANCE = Metric(("bpcr", "chance"), "chance", "chance", three)
RANDOM = Metric(("bpcr", "random_tied"), "random", "random", three)
INTERFERENCE = Metric(("interference", "fixed", "interference"), "interf.", "interference", three, "lower")

COSINE = Metric(("cosine",), "cosine", "cosine", three, "higher")
DECODER_COSINE = Metric(("max_decoder_cosine",), "decoder cosine", "decoder-cosine", three)
RECONSTRUCTED = [FVU, COSINE, L0, DEAD, DECODER_COSINE]
"""What rows take from reconstruction.json. A metric that is added here is in every table, comparison and file of results."""

FOUND = Metric(("ground_truth", "features", "all", "recovered"), "found", "found", three, "higher")
ONE_TO_ONE = Metric(("ground_truth", "features", "all", "one_to_one"), "one to one", "found", three, "higher")
F1 = Metric(("ground_truth", "features", "all", "f1"), "F1", "f1", three, "higher")
SILENT = Metric(("ground_truth", "absorption", "with_child"), "silent", "silent", three, "lower")

TRUTH = (
    Metric(("ground_truth", "features", "all", "max_cosine"), "cosine to truth", "found", three, "higher"),
    Metric(("ground_truth", "absorption", "alone"), "silent alone", "silent", three, "lower"),
    Metric(("ground_truth", "pairs", "all", "matched"), "planted pairs", "planted", count),
    Metric(("ground_truth", "pairs", "all", "captured"), "of them captured", "planted", three),
    Metric(("ground_truth", "pairs", "chance"), "by chance", "planted", three),
    Metric(("ground_truth", "false_capture", "rate"), "false capture", "planted", three),
)
REBUILDS = (
    COSINE,
    Metric(("loss", "recovered_mean"), "loss rec., mean", "recovered", three, "higher"),
)
GEOMETRY = (
    DECODER_COSINE,
    Metric(("interference", "own", "interference"), "interf., own pairs", "interference", three),
    Metric(("interference", "own", "co_activation"), "co-firing, own pairs", "interference", three),
    Metric(("interference", "fixed", "same_direction"), "still same latent", "same-direction", three),
)
CAPTURE = (
    Metric(("bpcr", "row"), "row", "masks", three),
    Metric(("bpcr", "column"), "column", "masks", three),
    Metric(("bpcr", "mutual"), "mutual", "masks", three),
    Metric(("bpcr", "lift"), "lift", "lift", two),
    Metric(("bpcr", "kappa"), "kappa", "kappa", three),
    Metric(("bpcr", "strength_weighted"), "by strength", "weighted", three),
    Metric(("bpcr", "phi_union"), "phi union", "phi", three),
    Metric(("bpcr", "permuted"), "permuted", "permuted", four),
    Metric(("bpcr", "live"), "live", "live", count),
    Metric(("bpcr", "pairs"), "pairs", "pairs", count),
)
EFFORT = (RESETS, Metric(("tokens",), "tokens", "tokens", count), Metric(("seconds",), "seconds", "seconds", one))


def probe_sizes(results: Results) -> list[str]:
    """The numbers of latents that probes may read, as the rows name them; none where there are no tasks."""
    return [*map(str, results["k_values"]), "all"] if results["tasks"] else []


def probing(results: Results) -> list[Metric]:
    """Sparse probing accuracy for each number of latents."""
    return [Metric(("sparse_probing", k), k, "probing", three, "higher") for k in probe_sizes(results)]


def pick(row: Row, *path: str) -> Any:
    """`row[a][b]...` for the path a, b, ...; None where a part of it is null or missing."""
    value: Any = row
    for key in path:
        value = value.get(key) if value is not None else None
    return value


def by_arm(rows: Rows, *path: str) -> dict[str, list[float]]:
    """What the rows of every arm hold at `path`, nulls left out, and arms left out that hold nothing."""
    values: dict[str, list[float]] = {}
    for row in rows:
        value = pick(row, *path)
        if value is not None:
            values.setdefault(row["arm"], []).append(value)
    return values


def measured(rows: Rows, metrics: Iterable[Metric]) -> list[Metric]:
    """Those of the metrics that some row holds."""
    return [metric for metric in metrics if any(pick(row, *metric.path) is not None for row in rows)]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)
