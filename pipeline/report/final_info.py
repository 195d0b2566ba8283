"""Builds `final_info.json`, which `experiment.py` writes into a run's folder: every metric of one arm, over its seeds."""

from statistics import stdev
from typing import Any

from pipeline.report.columns import Group, mean
from pipeline.report.metrics import measured
from pipeline.report.results import Results


def final_info(results: Results) -> dict[str, Any]:
    """Per layer: means over the seeds, their standard errors (None for one seed), and the value of every seed.

    The keys are those that the method's original run command writes. A degenerate SAE has no values; its reason is listed.
    """
    return {f"{results.experiment} layer {layer}": _layer(results, layer) for layer in results.layers}


def _layer(results: Results, layer: int) -> dict[str, Any]:
    rows = results.of_layer(layer)
    metrics = [metric for metric in measured(results) if metric.group != Group.planted]
    found = {metric.name: [metric.of(row) for row in rows] for metric in metrics}
    known = {name: [value for value in values if value is not None] for name, values in found.items()}
    known = {name: values for name, values in known.items() if values}
    return {
        "means": {f"{name}_mean": mean(values) for name, values in known.items()},
        "stderrs": {
            f"{name}_stderr": stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
            for name, values in known.items()
        },
        "final_info_dict": {"seed": [row.seed for row in rows], **found},
        "degenerate": {str(row.seed): row.degenerate for row in rows if row.degenerate},
    }
