"""The plots of what an SAE's latents are like: pair capture with both nulls, decoder cosines, density.

Every function takes the report's rows of one layer and returns None when there is nothing to draw.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from pipeline.report.drawing import (
    COLOURS,
    STYLE,
    WIDTH,
    ArmStyle,
    End,
    draw_line,
    label_ends,
    look,
    panels,
    principal,
    side_legend,
    styles_of,
    svg,
)
from pipeline.report.metrics import Rows, by_arm, mean, pick


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
    styles = styles_of(arms)
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
def capture_curves(name: str, rows: Rows, arms: Sequence[str]) -> Markup | None:
    """Pair capture as the mask grows and as more pairs are asked for, beside both nulls."""
    drawn = [arm for arm in principal(arms) if any(pick(row, "bpcr", "by_topk") for row in rows if row["arm"] == arm)]
    if not drawn:
        return None
    figure, axes_of = panels((250, 250))
    description = ["Two line charts of the pair capture rate (union), mean over seeds."]
    styles = styles_of(arms)
    curves = (
        ("by_topk", "topk", "Pairs captured, by the size of the mask"),
        ("by_pairs", "q", "Pairs captured, by how many count"),
    )
    for axes, (field, along, title) in zip(axes_of, curves, strict=True):
        ends: list[End] = []
        last = 0.0
        for arm in drawn:
            points = [pick(row, "bpcr", field) for row in rows if row["arm"] == arm and pick(row, "bpcr", field)]
            x, union = _mean_points(points, along, "union")
            if not x:
                continue
            draw_line(axes, x, union, styles[arm])
            for null, dashes in (("random_tied", (0, (1, 1.6))), ("chance", (0, (5, 3)))):
                places, values = _mean_points(points, along, null)
                axes.plot(places, values, color=styles[arm].colour, linewidth=1.3, linestyle=dashes, zorder=2)
            ends.append((arm, union[-1], styles[arm]))
            last = max(last, x[-1])
            description.append(f"{arm}: {union[0]:.3f} at {along} {x[0]:g}, {union[-1]:.3f} at {along} {x[-1]:g}.")
        axes.set_title(title)
        axes.set_xscale("log")
        axes.set_ylim(0, 1.02)
        ticks = sorted({point[along] for row in rows for point in pick(row, "bpcr", field) or []})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
        axes.grid(visible=False, axis="x")
        if ends:
            label_ends(axes, last, ends)
    axes_of[0].set_xlabel("K, share of the others that counts as similar")
    axes_of[1].set_xlabel("q, number of co-firing pairs per live latent")
    return svg(figure, name, description)


@mpl.rc_context(STYLE)
def histograms(name: str, rows: Rows, arms: Sequence[str]) -> Markup | None:
    """How often latents fire, and how similar their decoder directions are; counts summed over seeds, as shares."""
    drawn = [arm for arm in principal(arms) if any(row["arm"] == arm and pick(row, "density") for row in rows)]
    if not drawn:
        return None
    figure, (density, cosine) = panels((220, 220))
    styles = styles_of(arms)
    description = [
        "Two histograms over all seeds: how often latents fire, and the cosines between their decoder directions."
    ]
    for axes, field in ((density, "density"), (cosine, "decoder_cosine")):
        for arm in drawn:
            edges, shares = _shares([row[field] for row in rows if row["arm"] == arm and pick(row, field)])
            style = styles[arm]
            width = 2.0 if style.emphasised else 1.1
            axes.stairs(shares, edges, color=style.colour, linewidth=width, label=arm)
            middle = edges[max(range(len(shares)), key=shares.__getitem__)]
            description.append(f"{arm}, {field.replace('_', ' ')}: most in the bin from {middle:.2f}.")
    density.set_title("Share of latents, by how often they fire")
    density.set_xlabel("share of held-out tokens")
    density.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * 10**value:.3g}%"))
    density.set_ylim(bottom=0)
    cosine.set_title("Share of pairs of latents, by the cosine of their directions (log scale)")
    cosine.set_yscale("log")
    cosine.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    cosine.set_xlabel("cosine of two decoder directions")
    handles = [Line2D([], [], linestyle="none", label=arm, **look(styles[arm], 8)) for arm in drawn]
    side_legend(density, handles)
    return svg(figure, name, description)


def _mean_points(points: Sequence[Sequence[Mapping[str, Any]]], along: str, field: str) -> tuple[list[float], list[float]]:
    """Mean over the curves of `points` of `field` at each place of `along` where any has it."""
    values: dict[float, list[float]] = {}
    for curve in points:
        for point in curve:
            if point[field] is not None:
                values.setdefault(point[along], []).append(point[field])
    return sorted(values), [mean(values[place]) for place in sorted(values)]


def _shares(histograms: Sequence[Mapping[str, Any]]) -> tuple[list[float], list[float]]:
    """Edges, and the share of all counts in each bin; those of one study have the same edges."""
    counts = [sum(column) for column in zip(*(histogram["counts"] for histogram in histograms), strict=True)]
    return histograms[0]["edges"], [count / (sum(counts) or 1) for count in counts]
