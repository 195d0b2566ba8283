"""Turns the files of an evaluation into fields of a row of the results: one function for each entry of `EVALUATIONS`.

Each takes the parsed file (docs/evaluation-files.md) and returns fields of `results.Row`; metrics are paths into them.
"""

from collections.abc import Mapping, Sequence
from statistics import stdev
from typing import Any

File = Mapping[str, Any]
"""A parsed JSON file of an evaluation."""
Fields = dict[str, Any]
"""Fields of a row, before pydantic validates them."""

RATES = ("row", "column", "union", "mutual", "chance", "lift", "kappa", "strength_weighted", "live", "pairs", "reason")


def reconstruction(file: File) -> Fields:
    """Its numbers and histograms, as fields of the row itself."""
    return {name: value for name, value in file.items() if name not in ("rows", "explained_variance")}


def ground_truth(file: File) -> Fields:
    """The file as it is."""
    return {"ground_truth": file}


def synth_sae_bench(file: File) -> Fields:
    """The numbers of SAELens, those of latents as detectors among them."""
    numbers = {name: value for name, value in file.items() if name not in ("rows", "classification")}
    return {"synth_sae_bench": numbers | file["classification"]}


def capture(file: File) -> Fields:
    """The rates with both nulls, at the K and q of the study and along both curves."""
    nulls: Sequence[File] = file["null"]
    permuted: File = file["permuted"] or {}

    def points(curve: str, along: str) -> list[Fields]:
        return [
            {name: point[name] for name in (along, "union", "chance")}
            | {"random_tied": _mean([null[curve][number]["union"] for null in nulls])}
            for number, point in enumerate(file[curve])
        ]

    rates = {name: file[name] for name in RATES} | {"random_tied": _mean([null["union"] for null in nulls])}
    rates |= {"random_tied_std": _spread([null["union"] for null in nulls])}
    rates |= {"permuted": permuted.get("mean"), "permuted_std": permuted.get("std")}
    rates |= {f"phi_{name}": file["phi"][name] for name in ("union", "chance", "lift")}
    rates |= {"phi_random_tied": _mean([null["phi"]["union"] for null in nulls])}
    return {"bpcr": rates | {"by_topk": points("by_topk", "topk"), "by_pairs": points("by_pairs", "q")}}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _spread(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return stdev(known) if len(known) == len(values) else None


def interference(file: File) -> Fields:
    """The file as it is."""
    return {"interference": file}


def geometry(file: File) -> Fields:
    """The means, the shares of nearest cosines from 0.9 on, and those of random directions."""
    nearest, null = file["nearest"], file["nearest_random"]
    found = {
        "nearest": nearest["mean"],
        "near": nearest["near"],
        "nearest_random": null["mean"],
        "near_random": null["near"],
    }
    return {"geometry": found | {"encoder_decoder": file["encoder_decoder"]["mean"], "directions": file["directions"]}}


def stability(file: File) -> Fields:
    """The file as it is."""
    return {"stability": file}


def loss(file: File) -> Fields:
    """The losses in nats per token, and the share recovered against both ablations."""
    kept = {name: file[name] for name in ("clean", "sae", "zero", "mean", "reason")}
    return {"loss": kept | {f"recovered_{null}": file["recovered"][null] for null in ("zero", "mean")}}


def examples(file: File) -> Fields:
    """The file as it is."""
    return {"examples": file}


def browsing(file: File) -> Fields:
    """The file as it is."""
    return {"browsing": file}


def separated(file: File) -> Fields:
    """The file as it is."""
    return {"separated": file}


def sparse_probing(file: File) -> Fields:
    """Accuracies by number of latents out of sae-bench's output: of the SAE and of the model itself, overall and by task."""
    details = {detail["dataset_name"].removesuffix("_results"): detail for detail in file["eval_result_details"]}
    return {
        "sparse_probing": _by_k(file["eval_result_metrics"]["sae"], "sae"),
        "llm_probing": _by_k(file["eval_result_metrics"]["llm"], "llm"),
        "sparse_probing_by_task": {name: _by_k(detail, "sae") for name, detail in details.items()},
        "llm_probing_by_task": {name: _by_k(detail, "llm") for name, detail in details.items()},
    }


def probe_texts(file: File) -> Fields:
    """What each text adds, by data set and number of latents; nothing where SAEs got different problems."""
    return {"probe_texts": file["datasets"] or None}


def _by_k(metrics: Mapping[str, Any], who: str) -> dict[str, float]:
    """`sae_top_5_test_accuracy` becomes `5`, `sae_test_accuracy` becomes `all`; what was not measured is left out."""
    accuracies: dict[str, float] = {}
    for name, value in metrics.items():
        if name.startswith(f"{who}_") and value is not None:
            k = name.removeprefix(f"{who}_").removesuffix("test_accuracy").removeprefix("top_").rstrip("_")
            accuracies[k or "all"] = value
    return accuracies
