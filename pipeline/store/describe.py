"""Describes a store in tables: the model and texts behind it, its numbers of rows and bytes, and the norms of its rows."""

import json
from collections.abc import Iterator

from rich import box
from rich.filesize import decimal
from rich.table import Table

from pipeline.store import format as fmt
from pipeline.store.reader import ActivationStore
from pipeline.store.verify import store_norms


def store_info(store: ActivationStore) -> Iterator[Table]:
    """A table of what the store holds and one of its layers' norms. An unfinished store shows what is committed so far."""
    layout = store.layout
    bits = fmt.BITS[layout.dtype]
    plain = store.rows * layout.d_in * bits.torch_dtype.itemsize * len(layout.layers)
    stored = sum(
        check.bytes for commit in store.commits.values() for name, check in commit.files.items() if name.startswith("layer_")
    )
    facts = {
        "format": layout.format,
        "rows": f"{store.rows:,} in {len(store.shards):,} of {layout.shards:,} shards",
        "layers": f"{', '.join(map(str, layout.layers))}; d_in {layout.d_in}; {layout.dtype}, {layout.codec}",
        "bytes": f"{decimal(store.bytes)}, {store.bytes / max(1, store.rows):.1f} a row",
        "ratio": f"{plain / stored:.3f} of plain {layout.dtype}" if stored else "",
        "row order": layout.row_order,
        "left out": f"tokens {', '.join(map(str, layout.special_ids))}"
        + (f"; norms above {layout.max_norm} x median" if layout.max_norm else ""),
        **({"classes": ", ".join(layout.classes)} if layout.classes else {}),
        **{name: json.dumps(value) for name, value in layout.provenance.items() if name != "format"},
    }
    table = Table(title=str(store.storage), box=box.SIMPLE_HEAD, show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    yield table
    if store.commits:
        norms = Table("layer", "RMS norm", "median norm", "largest norm", "massive rows", box=box.SIMPLE_HEAD)
        for layer in layout.layers:
            of_layer = store_norms(store.commits, layer)
            numbers = (f"{of_layer.rms:.4g}", f"{of_layer.median:.4g}", f"{of_layer.max:.4g}", f"{of_layer.massive:,}")
            norms.add_row(str(layer), *numbers)
        yield norms
