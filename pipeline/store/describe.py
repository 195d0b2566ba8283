"""Describes a store in tables: the model and texts behind it, its numbers of rows and bytes, and the norms of its rows."""

import json
from collections.abc import Iterator, Sequence

from rich import box
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from pipeline.store import format as fmt
from pipeline.store.norms import massive_rows, store_facts, store_norms
from pipeline.store.reader import ActivationStore

MOST_SHOWN, LONGEST_VALUE = 256, 2000
"""Entries and characters of a value that are shown: a store says of itself what it likes."""


def store_info(store: ActivationStore) -> Iterator[Table | Text]:
    """A table of what the store holds, one of its layers' norms, and a sentence for each layer that massive rows rule.

    An unfinished store shows what is committed so far.
    """
    layout = store.layout
    bits = fmt.BITS[layout.dtype]
    plain = store.rows * layout.d_in * bits.torch_dtype.itemsize * len(layout.layers)
    stored = sum(
        check.bytes for commit in store.commits.values() for name, check in commit.files.items() if name.startswith("layer_")
    )
    facts = {
        "format": layout.format,
        "rows": f"{store.rows:,} in {len(store.shards):,} of {layout.shards:,} shards",
        **({} if layout.kept is None else {"streamed": f"{layout.shards - len(layout.kept):,} shards, made while training"}),
        "layers": f"{_few(layout.layers)}; d_in {layout.d_in}; {layout.dtype}, {layout.codec}",
        "bytes": f"{decimal(store.bytes)}, {store.bytes / max(1, store.rows):.1f} a row",
        "ratio": f"{plain / stored:.3f} of plain {layout.dtype}" if stored else "",
        "row order": layout.row_order,
        "left out": f"tokens {_few(layout.special_ids)}"
        + (f"; norms above {layout.max_norm} x median" if layout.max_norm else ""),
        **({"classes": _few(layout.classes)} if layout.classes else {}),
        **{name: json.dumps(value)[:LONGEST_VALUE] for name, value in layout.provenance.items() if name != "format"},
    }
    table = Table(title=Text(str(store.storage)), box=box.SIMPLE_HEAD, show_header=False)
    for name, value in facts.items():
        table.add_row(Text(name), Text(value))  # a name from a file may look like markup
    yield table
    if store.commits:
        norms = Table("layer", "RMS norm", "median norm", "largest norm", "massive rows", box=box.SIMPLE_HEAD)
        for layer in layout.layers:
            of_layer = store_norms(store.commits, layer)
            numbers = (f"{of_layer.rms:.4g}", f"{of_layer.median:.4g}", f"{of_layer.max:.4g}", f"{of_layer.massive:,}")
            norms.add_row(str(layer), *numbers)
        yield norms
        yield from map(Text, massive_rows(store_facts(layout, store.commits)))


def _few(values: Sequence[object]) -> str:
    shown = ", ".join(map(str, values[:MOST_SHOWN]))[:LONGEST_VALUE]
    return shown + (f" and {len(values) - MOST_SHOWN:,} more" if len(values) > MOST_SHOWN else "")
