"""What the commits of a store say together: rows, bytes, scale and norms of a layer, and the weight of its massive rows."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.errors import BadInputError
from pipeline.store import format as fmt
from pipeline.store.commits import MASSIVE, Commit

MASSIVE_SHARE = 0.1
"""Share of a layer's sum of squares above which its massive rows are told. Scale, FVU and L0 are then not those of ordinary
rows: where 1.3 % of the rows had 170 times the median norm, SAEs had an FVU of 0.002 at an L0 of 1, and without these rows
0.195 at 48.7."""


@dataclass(frozen=True, kw_only=True)
class StoreNorms:
    """Norms ||x|| of the activations of one layer in a whole store."""

    rms: float
    """Root mean square."""
    median: float
    """Median of the shards' medians."""
    max: float
    massive: int
    """Activations with more than `commits.MASSIVE` times their shard's median."""
    massive_share: float | None
    """Their share of the sum of squares; None where a commit of an earlier version does not have it."""


def scale(commits: Mapping[int, Commit], layer: int) -> float:
    """The factor that makes E||x||^2 = 1 over all rows of a layer. Raises BadInputError for rows that are all zero."""
    squares = _sum_squares(commits, layer)
    if not squares:
        raise BadInputError(f"all rows of layer {layer} are zero: extract another layer")
    return math.sqrt(_rows(commits) / squares)


def store_norms(commits: Mapping[int, Commit], layer: int) -> StoreNorms:
    """The norms of a layer over all committed shards."""
    norms = [commit.norms[layer] for commit in commits.values()]
    medians = sorted(shard.median for shard in norms)
    squares, massive = _sum_squares(commits, layer), [shard.massive_squares for shard in norms]
    known = [part for part in massive if part is not None]
    return StoreNorms(
        rms=math.sqrt(squares / _rows(commits)),
        median=medians[len(medians) // 2],
        max=max(shard.max for shard in norms),
        massive=sum(shard.massive for shard in norms),
        massive_share=math.fsum(known) / squares if squares and len(known) == len(massive) else None,
    )


def store_facts(layout: fmt.Layout, commits: Mapping[int, Commit]) -> dict[str, Any]:
    """The facts that the manifest of a finished store records. They follow from its layout and commits alone."""
    norms = {str(layer): asdict(store_norms(commits, layer)) for layer in layout.layers}
    if layout.row_order != "shuffled":  # nothing to tell: `max_norm` leaves out no row of a probe or synthetic store
        norms = {layer: {**known, "massive_share": None} for layer, known in norms.items()}
    streamed = {} if layout.kept is None else {"streamed": layout.rows - _rows(commits)}  # rows that no shard here has
    return {
        "rows": _rows(commits),
        **streamed,
        "bytes": sum(check.bytes for commit in commits.values() for check in commit.files.values()),
        "d_in": layout.d_in,
        "scales": {str(layer): scale(commits, layer) for layer in layout.layers},
        "norms": norms,
    }


def massive_rows(facts: Mapping[str, Any]) -> Iterator[str]:
    """A sentence for each layer whose massive rows have more than MASSIVE_SHARE of the sum of squares.

    `facts` are those of an activation store's manifest. A store of an earlier version does not have the share.
    """
    for layer, norms in facts.get("norms", {}).items():
        share = norms.get("massive_share")
        if share is not None and share > MASSIVE_SHARE:
            yield (
                f"layer {layer}: {norms['massive']:,} of {facts['rows']:,} rows have more than {MASSIVE:g} times the median "
                f"norm and {share:.1%} of the sum of squares, so scale, FVU and L0 are mostly theirs; "
                f"leave them out with store.max_norm = {MASSIVE:g}"
            )


def _rows(commits: Mapping[int, Commit]) -> int:
    return sum(commit.rows for commit in commits.values())


def _sum_squares(commits: Mapping[int, Commit], layer: int) -> float:
    return math.fsum(commit.norms[layer].sum_squares for commit in commits.values())
