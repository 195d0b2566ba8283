"""Fills the page's browser of latents: as many latents of every SAE as the page has room for."""

import json
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from pipeline.report.latents import Browsing
from pipeline.report.results import Row

ROOM = 5_000_000
"""Bytes of the page for it. The whole page stays below 8 MB."""
FEWEST = 2_000
"""Bytes of an SAE below which it is left out: no latent would fit."""


def browser(rows: Sequence[Row], room: int = ROOM) -> Markup | None:
    """The data of the browser as JSON inside a script element; None where no SAE has any.

    Every SAE gets the same room. Pairs come first, with their latents, then the other latents.
    """
    found = [(row, row.browsing) for row in rows if row.browsing and row.browsing.latents]
    each = room // max(1, len(found))
    if not found or each < FEWEST:
        return None
    saes = [{"name": _name(row), "layer": row.layer, **_fitting(browsing, each)} for row, browsing in found]
    text = json.dumps(saes, ensure_ascii=False, separators=(",", ":"))
    # Nothing in it may end the element, or begin a comment, whatever the texts say.
    return Markup(text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))  # noqa: S704


def _name(row: Row) -> str:
    level = "" if row.sparsity is None else f", trained at L0 {row.sparsity:g}"
    return f"{row.arm}, seed {row.seed}, layer {row.layer}{level}"


def _fitting(browsing: Browsing, room: int) -> dict[str, Any]:
    """The pairs and latents that take at most `room` bytes, in their short form."""
    latents = {
        latent.latent: [
            latent.latent,
            round(latent.density, 7),
            latent.captured,
            latent.pairs,
            [[_short(one.strength), one.before, one.token, one.after] for one in latent.contexts],
        ]
        for latent in browsing.latents
    }
    pairs: list[list[Any]] = []
    kept: dict[int, list[Any]] = {}
    # Captured and missed pairs in turn, so that both kinds fit.
    ordered = sorted(enumerate(browsing.pairs), key=lambda numbered: _turn(numbered[0], browsing))
    for _, pair in ordered:
        short = [*pair.latents, round(pair.cosine, 3), _short(pair.strength), int(pair.captured)]
        new = {latent: latents[latent] for latent in pair.latents if latent not in kept}
        room -= _bytes(short) + sum(map(_bytes, new.values()))
        if room < 0:
            break
        pairs.append(short)
        kept |= new
    for latent, entry in latents.items():
        if latent in kept:
            continue
        room -= _bytes(entry)
        if room < 0:
            break
        kept[latent] = entry
    return {"latents": sorted(kept.values(), key=lambda entry: -entry[1]), "pairs": pairs}


def _turn(number: int, browsing: Browsing) -> tuple[int, bool]:
    pair = browsing.pairs[number]
    return sum(other.captured == pair.captured for other in browsing.pairs[:number]), not pair.captured


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def _bytes(entry: list[Any]) -> int:
    return len(json.dumps(entry, ensure_ascii=False, separators=(",", ":")).encode()) + 1
