"""Plots metrics against L0: an arm that lies on one side of another all along is better or worse whatever L0 is wanted."""

from collections.abc import Sequence

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from pipeline.report.columns import Metric, by_arm, mean
from pipeline.report.drawing import STYLE, WIDTH, ArmStyle, look, plain, side_legend, styles_of, svg
from pipeline.report.metrics import L0
from pipeline.report.results import Row

LEFT, WIDE, HIGH, GAP, ABOVE, BELOW = 44, 300, 210, 72, 40, 46
"""Pixels of a panel and around it."""
COLUMNS = 2


@mpl.rc_context(STYLE)
def against_l0(name: str, rows: Sequence[Row], arms: Sequence[str], metrics: Sequence[Metric]) -> Markup | None:
    """A panel for each metric: a point per SAE, and a line through each arm's means where it was trained at several L0."""
    rows = [row for row in rows if row.l0]
    shown = [metric for metric in metrics if metric.pareto and any(metric.of(row) is not None for row in rows)]
    if not shown:
        return None
    total = -(-(len(shown) + 1) // COLUMNS) * (ABOVE + HIGH + BELOW)  # the legend takes a place
    figure = Figure(figsize=(WIDTH / 72, total / 72))
    drawn = [arm for arm in arms if any(row.arm == arm for row in rows)]
    styles = styles_of(arms)
    description = ["Scatter plots against L0, one point per SAE."]
    for index, metric in enumerate(shown):
        axes = _panel(figure, index, total, WIDE)
        for arm in drawn:
            _draw(axes, [row for row in rows if row.arm == arm], metric, styles[arm])
        better = f" ({metric.better} is better)" if metric.better else ""
        axes.set_title(f"{metric.pareto}{better}", fontsize=11.5)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(plain))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("L0, latents that fire per token")
        axes.margins(0.08)
        description += _described(rows, drawn, metric)
    side = _panel(figure, len(shown), total, 1)
    side.set_axis_off()
    side_legend(side, [Line2D([], [], linestyle="none", label=arm, **look(styles[arm], 8)) for arm in drawn])
    return svg(figure, name, description)


def _panel(figure: Figure, index: int, total: int, width: int) -> Axes:
    bottom = total - (index // COLUMNS + 1) * (ABOVE + HIGH + BELOW) + BELOW
    left = LEFT + index % COLUMNS * (WIDE + GAP)
    return figure.add_axes((left / WIDTH, bottom / total, width / WIDTH, HIGH / total))


def _draw(axes: Axes, rows: Sequence[Row], metric: Metric, style: ArmStyle) -> None:
    """The points of an arm, and a line through its means by level."""
    known = [(row, value) for row in rows if (value := metric.of(row)) is not None]
    order = 4 if style.emphasised else 3
    mark = look(style, 6)
    axes.plot([row.l0 or 0 for row, _ in known], [value for _, value in known], linestyle="none", zorder=order, **mark)
    levels = sorted({row.sparsity for row, _ in known if row.sparsity is not None})
    at = [[(row.l0 or 0, value) for row, value in known if row.sparsity == level] for level in levels]
    middle = sorted((mean([l0 for l0, _ in points]), mean([value for _, value in points])) for points in at)
    if middle:
        width = 2.0 if style.emphasised else 1.1
        axes.plot(*zip(*middle, strict=True), color=style.colour, linewidth=width, zorder=order - 1)


def _described(rows: Sequence[Row], arms: Sequence[str], metric: Metric) -> list[str]:
    values, l0 = by_arm(rows, metric), by_arm([row for row in rows if metric.of(row) is not None], L0)
    known = [arm for arm in arms if arm in values]
    return [f"{metric.pareto}, {arm}: {metric.show(mean(values[arm]))} at L0 {mean(l0[arm]):.1f}." for arm in known]
