"""A store that grows: taking over shards from a shorter one, against writing them, with the rows at hand.

    python benchmarks/growth.py [--shards 8]

One layer of Gemma-2-2B's width, shards of 32,768 rows in bfloat16. What is written was never computed here, so a model's
time would come on top of writing. Files are in the page cache, as after an extraction; a cold disk is slower.
"""

import argparse
import tempfile
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from measure import show

from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.workspace import Workspace
from pipeline.extract.relatives import Relatives
from pipeline.extract.shards import row_fields
from pipeline.store import format as fmt
from pipeline.store.writer import ShardWriter

D_IN, SHARD_ROWS, CONTEXT = 2304, 32768, 128


def laid_out(workspace: Workspace, shards: int) -> tuple[Artefact, ShardWriter, fmt.Sequences]:
    """An empty store of so many shards and its text, the first shards of which any such store has."""
    rows = shards * SHARD_ROWS
    tokens_SL = np.full((-(-rows // (CONTEXT - 1)), CONTEXT), 5, np.int32)
    tokens_SL[:, 0] = 0
    starts = np.arange(len(tokens_SL) + 1, dtype=np.int64)
    text = fmt.Sequences(tokens_SL=tokens_SL, row_offsets=starts * (CONTEXT - 1), doc_starts=starts[:-1] * CONTEXT + 1)
    layout = fmt.Layout.model_validate(
        {
            "rows": rows, "shard_rows": SHARD_ROWS, "chunk_rows": 1024, "layers": (12,), "d_in": D_IN, "dtype": "bfloat16",
            "codec": "raw", "row_order": "shuffled", "seed": 0, "special_ids": (0,),
            "provenance": {"store": {"tokens": rows, "layers": [12]}},
        }
    )  # fmt: skip
    artefact = Artefact(kind="stores", label="growth", inputs=layout.provenance)
    storage = workspace.storage(artefact)
    fmt.create(storage, fmt.NewStore(layout=layout, sequences=text))
    return artefact, ShardWriter(storage), text


def main() -> None:
    """Fill a store, then a longer one from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=8)
    count: int = parser.parse_args().shards
    rows_RD = torch.randn(SHARD_ROWS, D_IN).bfloat16()
    gigabytes = count * rows_RD.nbytes / 1e9
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder))
        _, writer, text = laid_out(workspace, count)
        fields = [
            row_fields(shard, writer.layout, text.passage(*writer.layout.shard_range(shard))) for shard in range(count)
        ]
        started = perf_counter()
        for shard in range(count):
            writer.write(shard, fmt.ShardRows(layers={12: rows_RD}, fields=fields[shard]))
        wrote = perf_counter() - started
        artefact, longer, text = laid_out(workspace, count + 1)
        relatives = Relatives(artefact, workspace, longer.layout)
        started = perf_counter()
        for shard in range(count):
            passage = text.passage(*longer.layout.shard_range(shard))
            kept, there = relatives.take_over(shard, passage, longer.storage)
            assert there
            longer.write(shard, fmt.ShardRows(layers={}, fields=kept), there)
        took = perf_counter() - started
    rows = [
        [name, f"{seconds:.1f}", f"{gigabytes / seconds:.2f}"]
        for name, seconds in (("written", wrote), ("taken over", took))
    ]
    show(f"{count} shards, {gigabytes:.1f} GB", ["", "seconds", "GB/s"], rows)


if __name__ == "__main__":
    main()
