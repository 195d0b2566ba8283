"""The comparison as a table for the terminal, 80 columns wide: a line per arm, mean over seeds and its standard error."""

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.report.columns import Group, Metric, mean, standard_error
from pipeline.report.metrics import columns
from pipeline.report.results import Results, Row, model_accuracies

WIDTH = 80


def results_table(results: Results) -> Table:
    """The table of a study: the metrics with a `Brief`; without the spread over seeds where that does not fit."""
    table = _table(results, spread=True)
    return table if Console(width=2 * WIDTH).measure(table).maximum <= WIDTH else _table(results, spread=False)


def _table(results: Results, *, spread: bool) -> Table:
    metrics = brief_metrics(results)
    range_shown = ", ± its standard error" if spread else ""
    table = Table(
        title=Text(f"{results.experiment}: mean over {len(results.seeds)} seeds{range_shown}{_at(results)}", "table.title"),
        caption=_caption(results, [metric for metric in metrics if metric.group == Group.probing]),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column("arm", no_wrap=True)
    for metric in metrics:
        assert metric.brief
        table.add_column(metric.brief.title, justify="right", no_wrap=True)
    layers = list(dict.fromkeys(row.layer for row in results.rows))
    for layer in layers:
        rows = results.of_layer(layer)
        if len(layers) > 1:
            table.add_row(f"layer {layer}", style="bold")
        for arm in dict.fromkeys(row.arm for row in rows):
            sound = [row for row in rows if row.arm == arm and not row.degenerate]
            table.add_row(arm, *(_cell(metric, sound, spread) for metric in metrics) if sound else ["degenerate"])
        llm = model_accuracies(rows)
        if llm:
            cells = [_short(llm[metric.path[-1]], 3) if metric.group == Group.probing else "" for metric in metrics]
            table.add_row("the model", *cells, style="italic")
    return table


def _at(results: Results) -> str:
    """Which L0 the table is of, where arms were trained at several."""
    return "" if results.shown_level is None else f", of the SAEs trained at L0 {results.shown_level:g}"


def brief_metrics(results: Results) -> list[Metric]:
    """The metrics of the table. In a synthetic study true features take the place of probing and pair capture.

    Where SAELens built the model, its metrics take the place of ours.
    """
    found = [metric for metric in columns(results) if isinstance(metric, Metric) and metric.brief]
    left_out = {Group.capture, Group.rates} if results.is_synthetic else set[Group]()
    if not results.tasks:
        left_out.add(Group.probing)
    by_saelens = any(row.synth_sae_bench for row in results.rows)
    left_out |= {Group.truth, Group.planted} if by_saelens else {Group.bench}
    return [metric for metric in found if metric.group not in left_out]


def _cell(metric: Metric, rows: Sequence[Row], spread: bool) -> str:
    assert metric.brief
    text = _mean([metric.of(row) for row in rows], metric.brief.digits, spread and metric.brief.spread)
    if metric.brief.of is None:
        return text
    return f"{text} of {_mean([row.at(metric.brief.of) for row in rows], 0, spread=False)}"


def _caption(results: Results, probing: Sequence[Metric]) -> str:
    return "\n".join((_explanation(results, probing), *results.store.remarks))


def _explanation(results: Results, probing: Sequence[Metric]) -> str:
    if any(row.synth_sae_bench for row in results.rows):
        return (
            "FVU: variance unexplained. MCC: mean cosine of latents to true features, one to one. F1: of each latent's "
            "firing as a detector of the true feature nearest to it. Both over all latents, as SAELens computes them."
        )
    if results.is_synthetic:
        return (
            "FVU: variance unexplained. found: true features that have a latent of their own, cosine > 0.8. F1: of the "
            "matching latents' firing. silent: rows where a child's latent fires and its parent's does not; alone: rows "
            "where the parent fires without a child and its latent does not. captured: of the planted pairs with two "
            "latents, how many the mask captures; not a score."
        )
    probed = ", ".join(metric.brief.title for metric in probing if metric.brief)
    return (
        f"FVU: variance unexplained. {probed + ': sparse probing accuracy. ' if probed else ''}"
        "BPCR: co-firing pairs that the mask captures, beside what chance and a random SAE capture; not a score."
    )


def _mean(values: Sequence[float | None], digits: int, spread: bool) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    text = _short(mean(known), digits)
    return f"{text}±{_short(standard_error(known), digits)}" if spread and len(known) > 1 else text


def _short(value: float, digits: int) -> str:
    return f"{value:.{digits}f}".removeprefix("0") if digits > 1 else f"{value:.{digits}f}"
