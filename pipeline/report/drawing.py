"""Draws the report's plots as inline SVG in CSS variables, which follow light and dark mode."""

import re
from collections.abc import Iterable, Sequence
from io import StringIO
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy.optimize import isotonic_regression

# matplotlib takes only real colours: `svg` replaces these by CSS variables.
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


def styles_of(arms: Sequence[str]) -> dict[str, ArmStyle]:
    """The look of every arm, the same in all plots of a study."""
    others = [arm for arm in arms if arm not in EMPHASISED]
    return {arm: ArmStyle(COLOURS[arm], marker, True) for arm, marker in EMPHASISED.items()} | {
        arm: ArmStyle(COLOURS[f"other-{index // 2 % 4}"], OTHER_MARKERS[index % len(OTHER_MARKERS)], False)
        for index, arm in enumerate(others)
    }


def panels(heights: Sequence[int]) -> tuple[Figure, list[Axes]]:
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


def look(style: ArmStyle, size: float) -> dict[str, Any]:
    """Marker and colour of an arm, as matplotlib's options."""
    return {
        "color": style.colour,
        "marker": style.marker,
        "markersize": size if style.emphasised else size - 1,
        "markerfacecolor": style.colour if style.emphasised else COLOURS["paper"],
        "markeredgecolor": COLOURS["paper"] if style.emphasised else style.colour,
        "markeredgewidth": 0.8 if style.emphasised else 1.2,
    }


def draw_line(
    axes: Axes, x: Iterable[float], y: Sequence[float], style: ArmStyle, markevery: tuple[int, int] = (0, 1)
) -> None:
    """An arm's line, `markevery` (first, gap) of its points with a marker."""
    width, depth = (2.2, 4) if style.emphasised else (1.1, 2)
    axes.plot(list(x), y, linewidth=width, zorder=depth, markevery=markevery, **look(style, 7.5))


def label_ends(axes: Axes, x: float, ends: Sequence[End]) -> None:
    """Name each line at its right end, `x`: marker and label in a column beside the plot, joined to the line's end."""
    axes.autoscale_view()
    box = axes.get_window_extent()
    to_fraction = axes.transData + axes.transAxes.inverted()
    ends = sorted(ends, key=lambda end: end[1])
    points: list[npt.NDArray[np.float64]] = [to_fraction.transform((x, value)) for _, value, _ in ends]
    heights = [float(point[1]) for point in points]
    last = float(points[0][0])
    for (label, _, style), height, place in zip(ends, heights, apart(heights, 16 / box.height), strict=True):
        shown: dict[str, Any] = {"transform": axes.transAxes, "clip_on": False}
        joint = 1 + 14 / box.width
        axes.plot([last + 6 / box.width, joint], [height, place], color=COLOURS["grid"], linewidth=1, zorder=1, **shown)
        axes.plot([joint + 8 / box.width], [place], **look(style, 7), **shown)
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


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """The places in [0, 1] nearest to the ascending `heights`, in least squares, that are `gap` apart."""
    shifts = [index * gap for index in range(len(heights))]
    shifted = [height - shift for height, shift in zip(heights, shifts, strict=True)]
    fitted = cast("npt.NDArray[np.float64]", isotonic_regression(shifted).x)  # scipy is untyped
    return [min(max(float(place), 0), 1 - shifts[-1]) + shift for place, shift in zip(fitted, shifts, strict=True)]


def side_legend(axes: Axes, handles: Sequence[Line2D]) -> None:
    """The legend at the right of a plot, the emphasised arms in their colours."""
    legend = axes.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(1.02, 1.02), labelspacing=0.55, handletextpad=0.2, borderaxespad=0
    )
    for handle, text in zip(handles, legend.get_texts(), strict=True):
        if handle.get_label() in EMPHASISED:
            text.set(fontweight="bold", color=COLOURS[str(handle.get_label())])
        else:
            text.set_color(COLOURS["muted"])


def plain(value: float, _: int) -> str:
    """A tick without needless digits, as matplotlib's formatter calls it."""
    return f"{value:g}"


def log_ticks(axes: Axes) -> None:
    """Labelled ticks on a logarithmic y axis that may span less than a decade."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(plain))
    axes.yaxis.set_minor_formatter(NullFormatter())


def principal(arms: Sequence[str]) -> list[str]:
    """The arms that a crowded plot shows: the emphasised ones, or the first three where there are none."""
    return [arm for arm in arms if arm in EMPHASISED] or list(arms[:3])


def svg(figure: Figure, name: str, description: Sequence[str]) -> Markup:
    """The figure as an SVG element for an HTML page; `name` prefixes its ids, so that those of two plots never clash."""
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


def as_image(plot: Markup, stylesheet: str) -> str:
    """A plot as an opaque SVG document of its own, in the light colours of the page's stylesheet."""
    variables = stylesheet[stylesheet.index(":root") : stylesheet.index("}") + 1].replace("color-scheme: light dark;", "")
    opening = '<svg xmlns="http://www.w3.org/2000/svg" style="background: var(--paper)"'
    head, body = str(plot).split(">", 1)
    return f"{head.replace('<svg', opening, 1)}><style>{variables}</style>{body}"
