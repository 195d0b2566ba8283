"""Writes what a study found in sentences that another page can quote: `findings.md`, a line for each planned comparison."""

from collections.abc import Iterator

from pipeline.report.answers import compared_arms, summary
from pipeline.report.columns import Metric
from pipeline.report.metrics import compared
from pipeline.report.results import Difference, Results
from pipeline.report.tables import interval


def findings(results: Results) -> str:
    """The summary, then for each layer every arm beside the one that it is compared with. Markdown."""
    lines = [f"{results.experiment}: {summary(results.differences)} In brackets stands the 95 % interval of each alone."]
    metrics = {metric.name: metric for metric in compared(results)}
    for layer in results.layers:
        planned = [entry for entry in results.differences if entry.planned and entry.layer == layer and entry.seeds]
        lines += ["", *([f"Layer {layer}:", ""] if len(results.layers) > 1 else []), *_arms(results, planned, metrics)]
    return "\n".join(lines).rstrip() + "\n"


def _arms(results: Results, planned: list[Difference], metrics: dict[str, Metric]) -> Iterator[str]:
    for arm, reference in compared_arms(results, planned):
        parts = [
            _part(entry, metrics[entry.metric]) for entry in planned if (entry.arm, entry.reference) == (arm, reference)
        ]
        yield f"- `{arm}` minus `{reference}`: {'; '.join(parts)}."


def _part(entry: Difference, metric: Metric) -> str:
    assert metric.planned
    found, within = metric.difference(entry.difference), interval(metric, entry.low, entry.high)
    verdict = (entry.verdict or "").split(". ")[0].rstrip(".")
    said = "undecided" if entry.outcome == "undecided" else verdict[:1].lower() + verdict[1:]
    return f"{metric.planned.heading} {found}{f' ({within})' if within else ''}, {said}"
