"""The report's plots: inline SVG whose colours are CSS variables, so that they follow the page's light or dark mode.

Every function takes the report's rows of one layer and returns None when there is nothing to draw.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from typing import Any, NamedTuple

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

Rows = Sequence[Mapping[str, Any]]

# matplotlib takes only real colours: these stand for the CSS variables that `_svg` puts in their place.
COLOURS = {
    name: f"#0101{index:02x}"
    for index, name in enumerate(
        ("ink", "muted", "grid", "paper", "baseline", "full", "no-contrast", "other-0", "other-1", "other-2", "other-3")
    )
}
EMPHASISED = {"baseline": "o", "full": "s", "no-contrast": "^"}
OTHER_MARKERS = "DvP<X>ph*d8"
WIDTH = 760
LABELS = 155
"""Pixels at the right of a plot that its labels need."""
CURVE_POINTS = 150

STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": COLOURS["muted"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.labelcolor": COLOURS["muted"],
    "axes.linewidth": 0.8,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": COLOURS["ink"],
    "axes.titlelocation": "left",
    "axes.titlepad": 14,
    "axes.titlesize": 12.5,
    "axes.titleweight": "bold",
    "figure.dpi": 72,
    "figure.facecolor": "none",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 12,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "text.color": COLOURS["ink"],
    "text.parse_math": False,
    "xtick.color": COLOURS["muted"],
    "xtick.major.size": 0,
    "ytick.color": COLOURS["muted"],
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
}


class ArmStyle(NamedTuple):
    """How one arm looks in every plot."""

    colour: str
    marker: str
    emphasised: bool


End = tuple[str, float, ArmStyle]
"""The right end of a line: its name, its last value, its look."""


def pick(row: Mapping[str, Any], *path: str) -> Any:
    """`row[a][b]...` for the path a, b, ...; None where a part of it is null or missing."""
    value: Any = row
    for key in path:
        value = value.get(key) if value is not None else None
    return value


def by_arm(rows: Rows, *path: str) -> dict[str, list[float]]:
    """What the rows of every arm hold at `path`, nulls left out, and arms left out that hold nothing."""
    values: dict[str, list[float]] = {}
    for row in rows:
        value = pick(row, *path)
        if value is not None:
            values.setdefault(row["arm"], []).append(value)
    return values


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


@mpl.rc_context(STYLE)
def probing_by_k(name: str, rows: Rows, arms: Sequence[str], k_values: Sequence[int]) -> Markup | None:
    """Probing accuracy of each arm by the number of latents, over the model's own line."""
    ks = [*map(str, k_values), "all"]
    accuracy = [by_arm(rows, "sparse_probing", k) for k in ks]
    drawn = [arm for arm in arms if all(arm in values for values in accuracy)]
    if not drawn:
        return None
    means = {arm: [mean(values[arm]) for values in accuracy] for arm in drawn}
    centre = [mean(column) for column in zip(*means.values(), strict=True)]
    styles = _styles(arms)
    figure, (above, below) = _panels((310, 230))
    description = ["Line chart of probing accuracy by the number of latents, mean over seeds."]
    ends: list[End] = []
    model = [by_arm(rows, "llm_probing", k) for k in ks]
    if all(model):
        line = [mean(next(iter(values.values()))) for values in model]
        above.plot(line, color=COLOURS["ink"], linewidth=1.4, linestyle=(0, (5, 3)), zorder=3)
        ends.append(("the model itself", line[-1], ArmStyle(COLOURS["ink"], "", True)))
        description.append(f"The model itself: {_from_to(ks, line)}.")
    for arm, line in means.items():
        _line(above, range(len(ks)), line, styles[arm])
        ends.append((arm, line[-1], styles[arm]))
        description.append(f"{arm}: {_from_to(ks, line)}.")
    differences: list[End] = []
    for arm, line in means.items():
        style = styles[arm]
        shift = 0.08 * (list(EMPHASISED).index(arm) - 1) if style.emphasised else 0
        places = [x + shift for x in range(len(ks))]
        difference = [value - middle for value, middle in zip(line, centre, strict=True)]
        _line(below, places, difference, style)
        if style.emphasised:
            lowest = [min(values[arm]) - middle for values, middle in zip(accuracy, centre, strict=True)]
            highest = [max(values[arm]) - middle for values, middle in zip(accuracy, centre, strict=True)]
            below.vlines(places, lowest, highest, color=style.colour, linewidth=1.4, zorder=4)
        differences.append((arm, difference[-1], style))
    for axes, labels in ((above, ends), (below, differences)):
        axes.set_xticks(range(len(ks)), ks)
        axes.set_xlim(-0.3, len(ks) - 0.7)
        axes.grid(visible=False, axis="x")
        _label_ends(axes, len(ks) - 1, labels)
    above.set_title("Accuracy on held-out texts")
    below.set_title("The same, above or below the mean of all arms")
    below.yaxis.set_major_formatter(FuncFormatter(_signed))
    below.set_xlabel("latents the probe may read (for the model itself: dimensions)")
    return _svg(figure, name, description)


@mpl.rc_context(STYLE)
def fvu_against_l0(name: str, rows: Rows, arms: Sequence[str]) -> Markup | None:
    """Reconstruction error against sparsity, one point per seed."""
    drawn = [row for row in rows if pick(row, "fvu") is not None and pick(row, "l0") is not None]
    if not drawn:
        return None
    figure, (axes,) = _panels((300,))
    description = ["Scatter plot of FVU against L0, one point per seed."]
    styles, handles = _styles(arms), []
    for arm in sorted({row["arm"] for row in drawn}, key=list(arms).index):
        style = styles[arm]
        l0, fvu = by_arm(drawn, "l0")[arm], by_arm(drawn, "fvu")[arm]
        axes.plot(l0, fvu, color=style.colour, linewidth=0.8, zorder=2)
        handles += axes.plot(l0, fvu, linestyle="none", zorder=4 if style.emphasised else 3, label=arm, **_marker(style, 8))
        description.append(f"{arm}: L0 {mean(l0):.1f}, FVU {mean(fvu):.3f}.")
    axes.set_xlabel("L0, latents active per token (fewer is sparser)")
    axes.set_title("FVU (lower is more faithful)")
    axes.margins(0.08)
    _side_legend(axes, handles)
    return _svg(figure, name, description)


@mpl.rc_context(STYLE)
def learning_curves(name: str, curves: Rows, arms: Sequence[str]) -> Markup | None:
    """FVU and L0 during training, mean over seeds."""
    present = {curve["arm"] for curve in curves}
    drawn = [arm for arm in arms if arm in present]
    styles = _styles(arms)
    figure, (above, below) = _panels((240, 240))
    description = ["Two line charts over training steps, mean over seeds."]
    for axes, field, title in ((above, "fvu", "FVU (log scale)"), (below, "l0", "L0, latents active per token (log scale)")):
        ends: list[End] = []
        last_step = 0
        for arm in drawn:
            steps, values = _mean_curve([curve for curve in curves if curve["arm"] == arm], field)
            if not steps:
                continue
            gap = max(1, len(steps) // 5)
            _line(axes, steps, values, styles[arm], markevery=(5 * drawn.index(arm) % gap, gap))
            ends.append((arm, values[-1], styles[arm]))
            last_step = max(last_step, steps[-1])
            description.append(f"{arm}: final {field.upper()} {values[-1]:.3g}.")
        if not ends:
            return None
        axes.set_yscale("log")
        _log_ticks(axes)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        axes.set_title(title)
        axes.grid(visible=False, axis="x")
        _label_ends(axes, last_step, ends)
    below.set_xlabel("training step")
    return _svg(figure, name, description)


@mpl.rc_context(STYLE)
def pair_capture(name: str, rows: Rows, arms: Sequence[str]) -> Markup | None:
    """Pair capture rate of each arm beside what chance and a random SAE reach."""
    union, chance, random = (by_arm(rows, "bpcr", field) for field in ("union", "chance", "random_tied"))
    if not union:
        return None
    height = 28 * len(arms) + 94
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    axes = figure.add_axes((120 / WIDTH, 52 / height, (WIDTH - 150) / WIDTH, (height - 94) / height))
    description = ["Dot plot of the pair capture rate (union), with both null values, mean over seeds."]
    styles = _styles(arms)
    bar: dict[str, Any] = {"marker": "|", "markersize": 15, "color": COLOURS["ink"], "markeredgewidth": 1.4}
    ring: dict[str, Any] = {"marker": "o", "markersize": 9, "color": COLOURS["ink"], "markerfacecolor": "none"}
    for y, arm in enumerate(arms):
        if arm not in union:
            axes.text(0.008, y, "not measured", va="center_baseline", fontstyle="italic", color=COLOURS["muted"])
            continue
        nulls = []
        for null, mark, label in ((chance, bar, "chance"), (random, ring, "random tied SAE")):
            if arm in null:
                axes.plot(null[arm], [y] * len(null[arm]), linestyle="none", zorder=3, **mark)
                nulls.append(f"{label} {mean(null[arm]):.3f}")
        axes.plot(union[arm], [y] * len(union[arm]), linestyle="none", zorder=4, **_marker(styles[arm], 8))
        description.append(f"{arm}: {mean(union[arm]):.3f}, {', '.join(nulls)}.")
    axes.set_yticks(range(len(arms)), arms)
    for arm, label in zip(arms, axes.get_yticklabels(), strict=True):
        if styles[arm].emphasised:
            label.set(color=styles[arm].colour, fontweight="bold")
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("share of the most co-firing pairs that the mask selects (union)")
    seed = _marker(ArmStyle(COLOURS["ink"], "s", True), 8)
    handles = [
        Line2D([], [], linestyle="none", label="the arm, one mark per seed", **seed),
        Line2D([], [], linestyle="none", label="chance", **bar),
        Line2D([], [], linestyle="none", label="random tied SAE, same L0", **ring),
    ]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.02, 1.01), ncols=3, handletextpad=0.3)
    return _svg(figure, name, description)


def _styles(arms: Sequence[str]) -> dict[str, ArmStyle]:
    others = [arm for arm in arms if arm not in EMPHASISED]
    return {arm: ArmStyle(COLOURS[arm], marker, True) for arm, marker in EMPHASISED.items()} | {
        arm: ArmStyle(COLOURS[f"other-{index // 2 % 4}"], OTHER_MARKERS[index % len(OTHER_MARKERS)], False)
        for index, arm in enumerate(others)
    }


def _panels(heights: Sequence[int]) -> tuple[Figure, list[Axes]]:
    """A figure of panels from top to bottom, with room for their titles and labels; heights in pixels."""
    left, title, labels = 60, 34, 34
    total = sum(heights) + len(heights) * (title + labels) + 12
    figure = Figure(figsize=(WIDTH / 72, total / 72))
    panels: list[Axes] = []
    top = total
    for height in heights:
        bottom = top - title - height
        box = (left / WIDTH, bottom / total, (WIDTH - left - LABELS) / WIDTH, height / total)
        panels.append(figure.add_axes(box))
        top = bottom - labels
    return figure, panels


def _marker(style: ArmStyle, size: float) -> dict[str, Any]:
    return {
        "color": style.colour,
        "marker": style.marker,
        "markersize": size if style.emphasised else size - 1,
        "markerfacecolor": style.colour if style.emphasised else COLOURS["paper"],
        "markeredgecolor": COLOURS["paper"] if style.emphasised else style.colour,
        "markeredgewidth": 0.8 if style.emphasised else 1.2,
    }


def _line(axes: Axes, x: Iterable[float], y: Sequence[float], style: ArmStyle, markevery: tuple[int, int] = (0, 1)) -> None:
    width, depth = (2.2, 4) if style.emphasised else (1.1, 2)
    axes.plot(list(x), y, linewidth=width, zorder=depth, markevery=markevery, **_marker(style, 7.5))


def _label_ends(axes: Axes, x: float, ends: Sequence[End]) -> None:
    """Name each line at its right end, `x`: marker and label in a column beside the plot, joined to the line's end."""
    axes.autoscale_view()
    box = axes.get_window_extent()
    to_fraction = axes.transData + axes.transAxes.inverted()
    ends = sorted(ends, key=lambda end: end[1])
    points = [to_fraction.transform((x, value)) for _, value, _ in ends]
    heights = [float(point[1]) for point in points]
    last = float(points[0][0])
    for (label, _, style), height, place in zip(ends, heights, _apart(heights, 16 / box.height), strict=True):
        shown: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
        joint = 1 + 14 / box.width
        axes.plot([last + 6 / box.width, joint], [height, place], color=COLOURS["grid"], linewidth=1, zorder=1, **shown)
        axes.plot([joint + 8 / box.width], [place], **_marker(style, 7), **shown)
        axes.text(
            joint + 18 / box.width,
            place,
            label,
            va="center_baseline",
            color=style.colour if style.emphasised else COLOURS["muted"],
            fontweight="bold" if style.emphasised else "normal",
            fontsize=11.5,
            transform=axes.transAxes,
        )


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """The places nearest to the ascending `heights`, in least squares, that are `gap` apart (pool adjacent violators)."""
    pools: list[list[float]] = []
    for index, height in enumerate(heights):
        pools.append([height - index * gap])
        while len(pools) > 1 and mean(pools[-2]) > mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    places = [mean(pool) for pool in pools for _ in pool]
    return [min(max(place, 0), 1 - (len(heights) - 1) * gap) + index * gap for index, place in enumerate(places)]


def _side_legend(axes: Axes, handles: Sequence[Line2D]) -> None:
    legend = axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.02), labelspacing=0.55, handletextpad=0.2, borderaxespad=0
    )
    for handle, text in zip(handles, legend.get_texts(), strict=True):
        if handle.get_label() in EMPHASISED:
            text.set(fontweight="bold", color=COLOURS[str(handle.get_label())])
        else:
            text.set_color(COLOURS["muted"])


def _log_ticks(axes: Axes) -> None:
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _mean_curve(curves: Rows, field: str) -> tuple[list[int], list[float]]:
    """Mean over seeds at each logged step, thinned to about CURVE_POINTS points of which the last is kept.

    Zeros are left out, for which a log axis has no place: the L0 of an SAE while all its latents are dead.
    """
    values: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in zip(curve["step"], curve[field], strict=True):
            if value:
                values.setdefault(step, []).append(value)
    steps = sorted(values)
    steps = steps[:: -max(1, len(steps) // CURVE_POINTS)][::-1]
    return steps, [mean(values[step]) for step in steps]


def _signed(value: float, _: int) -> str:
    rounded = round(value, 4)
    return f"{rounded:+g}".replace("-", "\N{MINUS SIGN}") if rounded else "0"


def _from_to(ks: Sequence[str], line: Sequence[float]) -> str:
    return f"{line[0]:.3f} at k = {ks[0]}, {line[-1]:.3f} with all"


def _svg(figure: Figure, name: str, description: Sequence[str]) -> Markup:
    """The figure as an SVG element to stand in an HTML page; `name` keeps its ids apart from those of other plots."""
    buffer = StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    body = re.sub(r"^.*?<svg[^>]*>\s*<defs>\s*<style.*?</defs>", "", buffer.getvalue(), count=1, flags=re.DOTALL)
    body = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"', "", body)
    body = re.sub(r'( id="|"#|url\(#)', rf"\g<1>{name}-", body).replace("xlink:href", "href")
    body = re.sub(r"'DejaVu Sans'[^;\"]*", "var(--plot-font)", body)
    names = {colour: name for name, colour in COLOURS.items()}
    body = re.sub(r"#0101[0-9a-f]{2}", lambda found: f"var(--{names[found[0]]})", body)
    width, height = (round(72 * side) for side in figure.get_size_inches())
    opening = Markup('<svg class="plot" role="img" viewBox="0 0 {} {}" aria-label="{}">')
    return opening.format(width, height, " ".join(description)) + Markup(body)  # noqa: S704 - matplotlib escapes the texts it draws
