"""Says in words what a planned difference shows: which arm is better and by how much, that both are equal, or neither."""

import math

from scipy import stats

from pipeline.report.columns import Caveat, Metric
from pipeline.report.results import Difference, Outcome
from pipeline.report.statistics import CONFIDENCE
from pipeline.report.text import signed

ALPHA = 1 - CONFIDENCE


def is_significant(entry: Difference) -> bool:
    """True if a planned difference is significant after correction."""
    return entry.p_holm is not None and entry.p_holm < ALPHA


def dominated(entry: Difference, metric: Metric) -> bool:
    """True if L0 alone would have made the difference the other way round, as where the arm with more latents is worse."""
    if metric.caveat != Caveat.equal_l0 or not entry.l0_ratio or entry.l0_ratio == 1 or entry.difference is None:
        return False
    improves = (entry.difference > 0) == (metric.better == "higher")
    return improves != ((entry.l0_ratio or 0) > 1)


def simultaneous(entry: Difference) -> tuple[float, float] | None:
    """The interval that holds beside those of all planned comparisons of the page (Bonferroni)."""
    if entry.difference is None or not entry.sd or not entry.df or not entry.family:
        return None
    half = float(stats.t.isf(ALPHA / entry.family / 2, entry.df)) * entry.sd / math.sqrt(entry.seeds)
    return entry.difference - half, entry.difference + half


def verdict(entry: Difference, metric: Metric) -> tuple[Outcome, str]:
    """The verdict on a planned difference, in a word and in a sentence."""
    if entry.seeds == 0 or entry.difference is None:
        return "not judged", "Not measured in both arms."
    if entry.seeds == 1:
        return "not judged", "One seed: nothing can be told."
    if entry.p is None or entry.p_holm is None:
        if entry.difference:
            return "not judged", "The same difference in every seed: no spread to test it against."
        return "not judged", "Exactly the same in every seed: the two arms never differed."
    if not is_significant(entry):
        return _not_told(entry, metric)
    direction = "higher" if entry.difference > 0 else "lower"
    if entry.interpolation_error is not None and entry.interpolation_error >= abs(entry.difference):
        unsure = "but by less than the interpolation between L0 is uncertain by: not told."
        return "not judged", f"{direction.capitalize()}, {unsure}"
    better = direction == metric.better
    if better and entry.failed:
        return "not judged", f"Better where both finished, but {_saes(entry.failed)} failed: not told."
    word: Outcome = "better" if better else "worse"
    return word, f"{word.capitalize()}{_beyond(entry, metric)}.{_dominance(entry, metric)}{_remarks(entry)}"


def _beyond(entry: Difference, metric: Metric) -> str:
    worth, ends = _worth(metric), simultaneous(entry)
    if ends is None:
        return ""
    if min(abs(end) for end in ends) > worth and ends[0] * ends[1] > 0:
        return f" by more than {_shown(worth, metric)}"
    return f", by less than {_shown(worth, metric)}" if max(abs(end) for end in ends) < worth else ""


def _dominance(entry: Difference, metric: Metric) -> str:
    worse = (entry.difference or 0) > 0 if metric.better == "lower" else (entry.difference or 0) < 0
    if not dominated(entry, metric) or entry.l0_ratio is None:
        return ""
    more = signed(f"{100 * (entry.l0_ratio - 1):.1f}%")
    return f" L0 differs by {more}, which alone would have made it {'better' if worse else 'worse'}."


def _remarks(entry: Difference) -> str:
    failures = f" {_saes(entry.failed).capitalize()} failed." if entry.failed else ""
    skew = " Seeds stray to one side here, so this is less sure than it says." if entry.skewed else ""
    return failures + skew


def _not_told(entry: Difference, metric: Metric) -> tuple[Outcome, str]:
    """The verdict on a difference that is not significant."""
    assert entry.p is not None
    assert entry.difference is not None
    if entry.l0_allowance and entry.l0_ratio and entry.p * (entry.family or 1) < ALPHA:
        change, most = signed(f"{100 * (entry.l0_ratio - 1):.1f}%"), metric.show(entry.l0_allowance)
        direction = "Higher" if entry.difference > 0 else "Lower"
        at = f"{direction}, but at another L0 ({change}), which alone can make a difference of {most}"
        return "not judged", f"{at}: which of the two is better, this does not tell."
    worth, ends = _worth(metric), simultaneous(entry)
    if ends is not None and max(abs(end) for end in ends) < worth:
        return "equal", f"Equal within {_shown(worth, metric)}.{_remarks(entry)}"
    lone = " Alone it would count as one; among these comparisons it does not." if entry.p < ALPHA else ""
    size = "" if entry.least is None else f" of less than {metric.show(entry.least)}"
    return "undecided", f"Undecided: {entry.seeds} seeds cannot tell a difference{size}.{lone}{_remarks(entry)}"


def _worth(metric: Metric) -> float:
    assert metric.planned  # only planned differences get verdicts
    return metric.planned.worth


def _shown(worth: float, metric: Metric) -> str:
    shown = metric.show(worth)
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def _saes(number: int) -> str:
    return "one SAE" if number == 1 else f"{number} SAEs"
