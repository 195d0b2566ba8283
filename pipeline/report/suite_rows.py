"""Turns sae-bench's outputs into fields of a row of the results, as `pipeline.report.rows` does with the other files."""

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.report.rows import Fields, File


def _shown(name: str, *path: str) -> Callable[[File], Fields]:
    """Numbers of one category of sae-bench's metrics; or only the reason why there are none."""

    def show(file: File) -> Fields:
        if "reason" in file:
            return {name: {"reason": file["reason"]}}
        found: Any = file["eval_result_metrics"]
        for step in path:
            found = found[step]
        return {name: {key: value for key, value in found.items() if isinstance(value, int | float)}}

    return show


def core(file: File) -> Fields:
    """The numbers of all its categories."""
    categories: Mapping[str, File] = file["eval_result_metrics"]
    return {"core": {key: value for category in categories.values() for key, value in category.items() if value is not None}}


scr = _shown("scr", "scr_metrics")
tpp = _shown("tpp", "tpp_metrics")
absorption = _shown("absorption", "mean")
meta_structure = _shown("meta_structure", "meta_structure")
ravel = _shown("ravel", "ravel")
autointerp = _shown("autointerp", "autointerp")
unlearning = _shown("unlearning", "unlearning")
sparse_probing_sae_probes = _shown("sparse_probing_sae_probes", "sae")
