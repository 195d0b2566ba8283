"""The plots that compare arms: probing, planned differences, learning curves. Those against L0 are in `pareto`.

Every function takes the rows of one layer and returns None when there is nothing to draw.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from pipeline.report.columns import Column, by_arm, mean
from pipeline.report.drawing import (
    COLOURS,
    EMPHASISED,
    STYLE,
    WIDTH,
    ArmStyle,
    End,
    draw_line,
    label_ends,
    log_ticks,
    look,
    panels,
    styles_of,
    svg,
)
from pipeline.report.results import Curve, Difference, Row, model_accuracies
from pipeline.report.verdicts import is_significant

CURVE_POINTS = 150


@mpl.rc_context(STYLE)
def probing_by_k(name: str, rows: Sequence[Row], arms: Sequence[str], ks: Sequence[str]) -> Markup | None:
    """Probing accuracy of each arm by the number of latents `ks`, beside the model's own."""
    accuracy = [by_arm(rows, Column(("sparse_probing", k))) for k in ks]
    drawn = [arm for arm in arms if all(arm in values for values in accuracy)]
    if not drawn:
        return None
    means = {arm: [mean(values[arm]) for values in accuracy] for arm in drawn}
    centre = [mean(column) for column in zip(*means.values(), strict=True)]
    styles = styles_of(arms)
    figure, (above, below) = panels((310, 230))
    description = ["Line chart of probing accuracy by the number of latents, mean over seeds."]
    ends: list[End] = []
    model = model_accuracies(rows)
    if model:
        line = [model[k] for k in ks]
        above.plot(line, color=COLOURS["ink"], linewidth=1.4, linestyle=(0, (5, 3)), zorder=3)
        ends.append(("the model itself", line[-1], ArmStyle(COLOURS["ink"], "", True)))
        description.append(f"The model itself: {_from_to(ks, line)}.")
    for arm, line in means.items():
        draw_line(above, range(len(ks)), line, styles[arm])
        ends.append((arm, line[-1], styles[arm]))
        description.append(f"{arm}: {_from_to(ks, line)}.")
    differences: list[End] = []
    for arm, line in means.items():
        style = styles[arm]
        shift = 0.08 * (list(EMPHASISED).index(arm) - 1) if style.emphasised else 0
        places = [x + shift for x in range(len(ks))]
        difference = [value - middle for value, middle in zip(line, centre, strict=True)]
        draw_line(below, places, difference, style)
        if style.emphasised:
            lowest = [min(values[arm]) - middle for values, middle in zip(accuracy, centre, strict=True)]
            highest = [max(values[arm]) - middle for values, middle in zip(accuracy, centre, strict=True)]
            below.vlines(places, lowest, highest, color=style.colour, linewidth=1.4, zorder=4)
        differences.append((arm, difference[-1], style))
    for axes, labels in ((above, ends), (below, differences)):
        axes.set_xticks(range(len(ks)), ks)
        axes.set_xlim(-0.3, len(ks) - 0.7)
        axes.grid(visible=False, axis="x")
        label_ends(axes, len(ks) - 1, labels)
    above.set_title("Accuracy on held-out texts")
    below.set_title("The same, above or below the mean of all arms")
    below.yaxis.set_major_formatter(FuncFormatter(_signed))
    below.set_xlabel("latents the probe may read (for the model itself: dimensions)")
    return svg(figure, name, description)


@mpl.rc_context(STYLE)
def forest(name: str, entries: Sequence[Difference], headings: Mapping[str, str], arms: Sequence[str]) -> Markup | None:
    """Planned differences with their intervals, a panel for each metric of `headings`; a filled mark is significant."""
    drawn = {metric: [entry for entry in entries if entry.metric == metric and entry.seeds] for metric in headings}
    drawn = {metric: found for metric, found in drawn.items() if found}
    if not drawn:
        return None
    labels = [arm for arm in arms if any(entry.arm == arm for found in drawn.values() for entry in found)]
    height, rows = 22 * len(labels) + 16, -(-len(drawn) // 2)
    total, left, wide, gap = rows * (height + 76), 118, 290, 44
    figure = Figure(figsize=(WIDTH / 72, total / 72))
    styles = styles_of(arms)
    description = ["Dot plots of the planned differences, arm minus the arm it changes, with 95 % intervals."]
    for index, (metric, found) in enumerate(drawn.items()):
        bottom = total - (index // 2 + 1) * (height + 76) + 40
        box = ((left + index % 2 * (wide + gap)) / WIDTH, bottom / total, wide / WIDTH, height / total)
        axes = figure.add_axes(box)
        axes.axvline(0, color=COLOURS["ink"], linewidth=1, zorder=1)
        for entry in found:
            _draw_difference(axes, labels.index(entry.arm), entry, styles[entry.arm])
            span = "" if entry.low is None else f" ({entry.low:+.3g} to {entry.high:+.3g})"
            description.append(f"{headings[metric]}, {entry.arm} minus {entry.reference}: {entry.difference:+.3g}{span}.")
        axes.set_yticks(range(len(labels)), labels if index % 2 == 0 else [""] * len(labels))
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(FuncFormatter(_signed))
        axes.set_title(headings[metric], fontsize=11.5, pad=8)
    return svg(figure, name, description)


def _draw_difference(axes: Axes, y: int, entry: Difference, style: ArmStyle) -> None:
    if entry.difference is None:
        return
    if entry.low is not None and entry.high is not None:
        axes.hlines(y, entry.low, entry.high, color=style.colour, linewidth=1.6, zorder=2)
    mark: dict[str, Any] = look(style, 7) | {
        "markerfacecolor": style.colour if is_significant(entry) else COLOURS["paper"],
        "markeredgecolor": style.colour,
        "markeredgewidth": 1.4,
    }
    axes.plot([entry.difference], [y], linestyle="none", zorder=3, **mark)


@mpl.rc_context(STYLE)
def learning_curves(name: str, curves: Sequence[Curve], arms: Sequence[str]) -> Markup | None:
    """FVU and L0 during training, mean over seeds."""
    present = {curve.arm for curve in curves}
    drawn = [arm for arm in arms if arm in present]
    styles = styles_of(arms)
    figure, (above, below) = panels((240, 240))
    description = ["Two line charts over training steps, mean over seeds."]
    panes: tuple[tuple[Axes, Literal["fvu", "l0"], str], ...] = (
        (above, "fvu", "FVU (log scale)"),
        (below, "l0", "L0, latents that fire per token (log scale)"),
    )
    for axes, field, title in panes:
        ends: list[End] = []
        last_step = 0
        for arm in drawn:
            steps, values = _mean_curve([curve for curve in curves if curve.arm == arm], field)
            if not steps:
                continue
            gap = max(1, len(steps) // 5)
            draw_line(axes, steps, values, styles[arm], markevery=(5 * drawn.index(arm) % gap, gap))
            ends.append((arm, values[-1], styles[arm]))
            last_step = max(last_step, steps[-1])
            description.append(f"{arm}: final {field.upper()} {values[-1]:.3g}.")
        if not ends:
            return None
        axes.set_yscale("log")
        log_ticks(axes)
        axes.xaxis.set_major_formatter(FuncFormatter(_thousands))
        axes.set_title(title)
        axes.grid(visible=False, axis="x")
        label_ends(axes, last_step, ends)
    below.set_xlabel("training step")
    return svg(figure, name, description)


def _mean_curve(curves: Sequence[Curve], field: Literal["fvu", "l0"]) -> tuple[list[int], list[float]]:
    """Mean over seeds at each logged step, thinned to about CURVE_POINTS points of which the last is kept.

    Zeros, which a log axis cannot show, are left out: the L0 of an SAE while all its latents are dead.
    """
    values: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in zip(curve.step, curve.fvu if field == "fvu" else curve.l0, strict=True):
            if value:
                values.setdefault(step, []).append(value)
    steps = sorted(values)
    steps = steps[:: -max(1, len(steps) // CURVE_POINTS)][::-1]
    return steps, [mean(values[step]) for step in steps]


def _thousands(value: float, _: int) -> str:
    return f"{value:,.0f}"


def _signed(value: float, _: int) -> str:
    rounded = round(value, 4)
    return f"{rounded:+g}".replace("-", "\N{MINUS SIGN}") if rounded else "0"


def _from_to(ks: Sequence[str], line: Sequence[float]) -> str:
    return f"{line[0]:.3f} at k = {ks[0]}, {line[-1]:.3f} with all"
