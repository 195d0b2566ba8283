"""The table of evaluations: what is computed for every SAE, into which file, and how the report shows it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from pipeline.study.stage_code import StageCode


class Need(StrEnum):
    """Data that only some studies have. Every study has held-out rows and latents, so these need no entry."""

    probes = "probes"
    """Labelled texts."""
    model = "model"
    """A language model, with its tokenizer and the tokens behind the rows."""
    truth = "truth"
    """The features of a synthetic model."""
    saelens = "saelens"
    """A synthetic model that SAELens built."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """One evaluation of an SAE."""

    name: str
    """Its key in the table."""
    file: str
    """Its file inside its artefact."""
    apart: int | None = None
    """Format number of an evaluation that has an artefact of its own, so that it can be added to a finished study. It may
    read weights alone, as its key covers nothing else, unless the next fields say more. None: it is a part of the SAE's
    evaluation, and an SAE that was evaluated without it stays so."""
    asked: bool = False
    """Whether only studies have it that name it in `[evaluate] saebench`. It has an artefact of its own, may read the model,
    too, and its key also covers the model and its settings in [saebench]."""
    rows: bool = False
    """Whether it reads what the SAE's evaluation reads, with which it is made: its key covers that evaluation's."""
    siblings: bool = False
    """Whether it reads the SAEs of the arm's other seeds. An arm with one seed leaves it out."""
    control: bool = False
    """Whether it reads the SAE of the arm's control (`Recipes.control`). An arm without one leaves it out."""
    needs: frozenset[Need] = frozenset()
    """A study without one of these leaves the evaluation out."""
    compute: StageCode
    """Takes an SAE's `Bench` (pipeline/evaluate/bench.py), returns the content of the file: JSON without NaN."""
    show: StageCode
    """Takes the content of the file, returns fields of a row of the results (pipeline/report/rows.py)."""


def _entry(name: str, module: str, *needs: Need, **how: Any) -> Evaluation:
    return Evaluation(
        name=name,
        file=f"{name}.json",
        needs=frozenset(needs),
        compute=f"pipeline.evaluate.{module}:compute",
        show=f"pipeline.report.rows:{name}",
        **how,
    )


def _of_sae_bench(name: str, module: str) -> Evaluation:
    return Evaluation(
        name=name,
        file=f"{name}.json",
        apart=1,
        asked=True,
        needs=frozenset({Need.model}),
        compute=f"pipeline.evaluate.saebench.{module}:{name}",
        show=f"pipeline.report.suite_rows:{name}",
    )


EVALUATIONS: dict[str, Evaluation] = {
    entry.name: entry
    for entry in (
        _entry("reconstruction", "reconstruction"),
        _entry("ground_truth", "recovery", Need.truth),
        _entry("synth_sae_bench", "synth_sae_bench", Need.saelens),
        _entry("capture", "capture"),
        _entry("interference", "interference"),
        _entry("loss", "loss"),  # without a model, these two write a file that says why it is empty
        _entry("examples", "examples"),
        _entry("sparse_probing", "sparse_probing", Need.probes),
        _entry("probe_texts", "probe_texts", Need.probes),
        _entry("geometry", "geometry", apart=1),
        _entry("stability", "stability", apart=1, siblings=True),
        _entry("browsing", "browsing", Need.model, apart=1, rows=True),
        _entry("separated", "separated", apart=1, rows=True, control=True),
        _of_sae_bench("core", "core_metrics"),
        _of_sae_bench("scr", "concepts"),
        _of_sae_bench("tpp", "concepts"),
        _of_sae_bench("absorption", "absorption"),
        _of_sae_bench("meta_structure", "composition"),
        _of_sae_bench("sparse_probing_sae_probes", "many_probes"),
        _of_sae_bench("ravel", "whole"),
        _of_sae_bench("unlearning", "whole"),
        _of_sae_bench("autointerp", "whole"),
    )
}
"""By name, in the order in which they are computed."""
