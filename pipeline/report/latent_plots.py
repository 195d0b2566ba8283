"""The plots of an SAE's latents: pair capture with both nulls, decoder cosines, density.

Every function takes the rows of one layer and returns None when there is nothing to draw.
"""

from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from pipeline.report.capture_metrics import CHANCE, RANDOM, UNION
from pipeline.report.columns import by_arm, mean
from pipeline.report.drawing import (
    COLOURS,
    STYLE,
    WIDTH,
    ArmStyle,
    look,
    panels,
    plain,
    principal,
    side_legend,
    styles_of,
    svg,
)
from pipeline.report.results import Histogram, Row


@mpl.rc_context(STYLE)
def pair_capture(name: str, rows: Sequence[Row], arms: Sequence[str]) -> Markup | None:
    """Pair capture rate of each arm beside what chance and a random SAE reach."""
    union, chance, random = (by_arm(rows, metric) for metric in (UNION, CHANCE, RANDOM))
    if not union:
        return None
    height = 28 * len(arms) + 94
    figure = Figure(figsize=(WIDTH / 72, height / 72))
    axes = figure.add_axes((120 / WIDTH, 52 / height, (WIDTH - 150) / WIDTH, (height - 94) / height))
    description = ["Dot plot of the pair capture rate (union), with both null values, mean over seeds."]
    styles = styles_of(arms)
    bar: dict[str, Any] = {"marker": "|", "markersize": 15, "color": COLOURS["ink"], "markeredgewidth": 1.4}
    ring: dict[str, Any] = {"marker": "o", "markersize": 9, "color": COLOURS["ink"], "markerfacecolor": "none"}
    for y, arm in enumerate(arms):
        if arm not in union:
            axes.text(0.008, y, "not measured", va="center_baseline", fontstyle="italic", color=COLOURS["muted"])
            continue
        nulls: list[str] = []
        for null, mark, label in ((chance, bar, "chance"), (random, ring, "random tied SAE")):
            if arm in null:
                axes.plot(null[arm], [y] * len(null[arm]), linestyle="none", zorder=3, **mark)
                nulls.append(f"{label} {mean(null[arm]):.3f}")
        axes.plot(union[arm], [y] * len(union[arm]), linestyle="none", zorder=4, **look(styles[arm], 8))
        description.append(f"{arm}: {mean(union[arm]):.3f}, {', '.join(nulls)}.")
    axes.set_yticks(range(len(arms)), arms)
    for arm, label in zip(arms, axes.get_yticklabels(), strict=True):
        if styles[arm].emphasised:
            label.set(color=styles[arm].colour, fontweight="bold")
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("share of the most co-firing pairs that the mask selects (union)")
    seed = look(ArmStyle(COLOURS["ink"], "s", True), 8)
    handles = [
        Line2D([], [], linestyle="none", label="the arm, one mark per seed", **seed),
        Line2D([], [], linestyle="none", label="chance", **bar),
        Line2D([], [], linestyle="none", label="random tied SAE, same L0", **ring),
    ]
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(-0.02, 1.01), ncols=3, handletextpad=0.3)
    return svg(figure, name, description)


@mpl.rc_context(STYLE)
def histograms(name: str, rows: Sequence[Row], arms: Sequence[str]) -> Markup | None:
    """How often latents fire, and how similar their decoder directions are; counts summed over seeds, as shares."""
    drawn = [arm for arm in principal(arms) if any(row.arm == arm and row.density for row in rows)]
    if not drawn:
        return None
    figure, (density, cosine) = panels((220, 220))
    styles = styles_of(arms)
    description = [
        "Two histograms over all seeds: how often latents fire, and the cosines between their decoder directions."
    ]
    densities = [(row.arm, row.density) for row in rows if row.density]
    cosines = [(row.arm, row.decoder_cosine) for row in rows if row.decoder_cosine]
    for axes, histograms, title in ((density, densities, "density"), (cosine, cosines, "decoder cosine")):
        for arm in drawn:
            edges, shares = _shares([histogram for one, histogram in histograms if one == arm])
            style = styles[arm]
            width = 2.0 if style.emphasised else 1.1
            axes.stairs(shares, edges, color=style.colour, linewidth=width, label=arm)
            middle = edges[max(range(len(shares)), key=shares.__getitem__)]
            description.append(f"{arm}, {title}: most in the bin from {middle:.2f}.")
    density.set_title("Share of latents, by how often they fire")
    density.set_xlabel("share of held-out tokens")
    density.xaxis.set_major_formatter(FuncFormatter(_percent_of_log10))
    density.set_ylim(bottom=0)
    cosine.set_title("Share of pairs of latents, by the cosine of their directions (log scale)")
    cosine.set_yscale("log")
    cosine.yaxis.set_major_formatter(FuncFormatter(plain))
    cosine.set_xlabel("cosine of two decoder directions")
    handles = [Line2D([], [], linestyle="none", label=arm, **look(styles[arm], 8)) for arm in drawn]
    side_legend(density, handles)
    return svg(figure, name, description)


def _percent_of_log10(value: float, _: int) -> str:
    return f"{100 * 10**value:.3g}%"


def _shares(histograms: Sequence[Histogram]) -> tuple[list[float], list[float]]:
    """Edges, and the share of all counts in each bin; those of one study have the same edges."""
    counts = [sum(column) for column in zip(*(histogram.counts for histogram in histograms), strict=True)]
    return list(histograms[0].edges), [count / (sum(counts) or 1) for count in counts]
