"""Writes numbers, times and names as the report shows them."""

from datetime import UTC, datetime

from pydantic import JsonValue

MINUS = "\N{MINUS SIGN}"


def one(value: float) -> str:
    """One decimal."""
    return f"{value:,.1f}"


def two(value: float) -> str:
    """Two decimals."""
    return f"{value:.2f}"


def three(value: float) -> str:
    """Three decimals."""
    return f"{value:.3f}"


def four(value: float) -> str:
    """Four decimals."""
    return f"{value:.4f}"


def percent(value: float) -> str:
    """A share in per cent."""
    return f"{100 * value:.1f}%"


def significant(value: float) -> str:
    """Three significant digits, for numbers of any scale."""
    return f"{value:.3g}"


def count(value: float) -> str:
    """A whole number, thousands set apart."""
    return f"{value:,.0f}"


def signed(text: str) -> str:
    """A written number with its sign; without one where it is written as 0."""
    digits = text.lstrip("-")
    if not digits.strip("0.,%"):
        return digits
    return f"{MINUS}{digits}" if text.startswith("-") else f"+{digits}"


def p_value(value: float) -> str:
    """A p value."""
    return "< 0.001" if value < 0.001 else three(value)


def duration(seconds: float) -> str:
    """A time in the unit that suits it."""
    if seconds < 120:
        return f"{seconds:.3g} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def scalar(value: JsonValue) -> str:
    """Any setting or fact: integers with separators, other numbers to four digits, lists with commas."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int):
        return count(value)
    if isinstance(value, list):
        return ", ".join(map(scalar, value)) or "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def words(name: str) -> str:
    """A field's name as words."""
    return name.replace("_", " ")


def date(timestamp: str) -> str:
    """An ISO time as a reader's date."""
    moment = datetime.fromisoformat(timestamp).astimezone(UTC)
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"
