"""The comparison as a table for the terminal: one line per arm, mean over seeds and half the range between them."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table

COLUMNS = {
    "FVU": ("fvu",),
    "L0": ("l0",),
    "dead": ("dead_fraction",),
    "BPCR": ("bpcr", "union"),
    "chance": ("bpcr", "chance"),
    "random": ("bpcr", "random_tied"),
}


def results_table(results: Mapping[str, Any]) -> Table:
    """A table of `pipeline.report.collect.collect`'s results."""
    ks = ["1", str(results["k_values"][-1]), "all"]
    columns = COLUMNS | {("all latents" if k == "all" else f"top {k}"): ("sparse_probing", k) for k in ks}
    seeds = {row["seed"] for row in results["rows"]}
    table = Table(
        title=f"{results['experiment']}: mean over {len(seeds)} seeds, ± half the range between them",
        caption="FVU: variance unexplained. top k: probing accuracy. BPCR: pairs captured, beside chance and a random SAE.",
        box=box.SIMPLE_HEAD,
    )
    table.add_column("arm", no_wrap=True)
    table.add_column("layer", justify="right")
    for title in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for arm, layer in dict.fromkeys((row["arm"], row["layer"]) for row in results["rows"]):
        rows = [row for row in results["rows"] if (row["arm"], row["layer"]) == (arm, layer)]
        table.add_row(arm, str(layer), *(_cell(rows, path) for path in columns.values()))
    for layer in dict.fromkeys(row["layer"] for row in results["rows"]):
        llm = next((row["llm_probing"] for row in results["rows"] if row["layer"] == layer and row["llm_probing"]), {})
        cells = (f"{llm[path[1]]:.3f}" if path[0] == "sparse_probing" and llm else "" for path in columns.values())
        table.add_row("the model itself", str(layer), *cells, style="italic")
    return table


def _cell(rows: list[Mapping[str, Any]], path: tuple[str, ...]) -> str:
    values: list[float] = []
    for row in rows:
        value: Any = row
        for name in path:
            value = value[name] if value is not None else None
        if value is not None:
            values.append(value)
    if not values:
        return "–"
    mean, spread = sum(values) / len(values), (max(values) - min(values)) / 2
    digits = 1 if path == ("l0",) else 3
    return f"{mean:.{digits}f} ±{spread:.{digits}f}".replace("±0.", "±.") if len(values) > 1 else f"{mean:.{digits}f}"
