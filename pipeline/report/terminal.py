"""The comparison as a table for the terminal, 80 columns wide: a line per arm, mean over seeds and half their range."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

Row = Mapping[str, Any]
TRUTH_COLUMNS = ("found", "F1", "silent", "alone", "captured")
"""What stands in place of probing and pair capture where the true features are known."""


def results_table(results: Mapping[str, Any]) -> Table:
    """A table of `pipeline.report.collect.collect`'s results."""
    # The smallest and the largest probe.
    ks = [str(k) for k in dict.fromkeys((results["k_values"][0], results["k_values"][-1]))] if results["tasks"] else []
    layers = list(dict.fromkeys(row["layer"] for row in results["rows"]))
    seeds = len({row["seed"] for row in results["rows"]})
    table = Table(
        title=f"{results['experiment']}: mean over {seeds} seeds, ± half their range",
        caption=_caption(results, ks),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("arm", no_wrap=True)
    probed = [f"top {k}" for k in ks]
    judged = TRUTH_COLUMNS if results["is_synthetic"] else [*probed, "BPCR", "chance", "random"]
    for title in ("FVU", "L0", *judged):
        table.add_column(title, justify="right", no_wrap=True)
    for layer in layers:
        of_layer = [row for row in results["rows"] if row["layer"] == layer]
        if len(layers) > 1:
            table.add_row(f"layer {layer}", style="bold")
        for arm in dict.fromkeys(row["arm"] for row in of_layer):
            table.add_row(arm, *_cells([row for row in of_layer if row["arm"] == arm], ks))
        llm = next((row["llm_probing"] for row in of_layer if row["llm_probing"]), None)
        if llm:
            table.add_row("the model", "", "", *(_short(llm[k], 3) for k in ks), style="italic")
    return table


def _cells(rows: Sequence[Row], ks: Sequence[str]) -> list[str]:
    sound = [row for row in rows if not row["degenerate"]]
    if not sound:
        return ["degenerate"]
    reconstruction = [_mean([row["fvu"] for row in sound]), _mean([row["l0"] for row in sound], 1)]
    if sound[0]["ground_truth"]:
        return [*reconstruction, *_truth_cells([row["ground_truth"] for row in sound])]
    capture = [row["bpcr"] for row in sound]
    return [
        *reconstruction,
        *(_mean([row["sparse_probing"][k] for row in sound]) for k in ks),
        _mean([rates["union"] for rates in capture], 2),
        _mean([rates["chance"] for rates in capture], 2, spread=False),
        _mean([rates["random_tied"] for rates in capture], 2, spread=False),
    ]


def _truth_cells(truths: Sequence[Row]) -> list[str]:
    features = [truth["features"]["all"] for truth in truths]
    pairs = [truth["pairs"]["all"] for truth in truths]
    return [
        _mean([measured["one_to_one"] for measured in features]),
        _mean([measured["f1"] for measured in features], 2),
        _mean([truth["absorption"]["with_child"] for truth in truths], 2),
        _mean([truth["absorption"]["alone"] for truth in truths], 2, spread=False),
        f"{_mean([rates['captured'] for rates in pairs], 2, spread=False)} of "
        f"{_mean([rates['matched'] for rates in pairs], 0, spread=False)}",
    ]


def _caption(results: Mapping[str, Any], ks: Sequence[str]) -> str:
    if results["is_synthetic"]:
        return (
            "FVU: variance unexplained. found: true features that have a latent of their own, cosine > 0.8. F1: of the "
            "matching latents' firing. silent: rows where a child's latent fires and its parent's does not; alone: rows "
            "where the parent fires without a child and its latent does not. captured: of the planted pairs with two "
            "latents, how many the mask captures; not a score."
        )
    probed = ", ".join(f"top {k}" for k in ks)
    return (
        f"FVU: variance unexplained. {probed + ': sparse probing accuracy. ' if ks else ''}"
        "BPCR: co-firing pairs that the mask captures, beside what chance and a random SAE capture; not a score."
    )


def _mean(values: Sequence[float | None], digits: int = 3, spread: bool = True) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    mean = _short(sum(known) / len(known), digits)
    return f"{mean}±{_short((max(known) - min(known)) / 2, digits)}" if spread and len(known) > 1 else mean


def _short(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".removeprefix("0") if digits > 1 else f"{value:.{digits}f}"
