"""A store of a few small tensors, for what needs no model."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from pipeline.artefacts.storage import LocalStorage
from pipeline.store import format as fmt
from pipeline.store.reader import ActivationStore
from pipeline.store.writer import ShardWriter

D_IN, SHARD_ROWS, CHUNK_ROWS = 8, 64, 16


def new_store(rows: int, **changes: object) -> fmt.NewStore:
    """A store of one long sequence, to be laid out."""
    values = {
        "rows": rows, "shard_rows": SHARD_ROWS, "chunk_rows": CHUNK_ROWS, "layers": (3,), "d_in": D_IN,
        "dtype": "bfloat16", "codec": "raw", "row_order": "shuffled", "seed": 0, "special_ids": (0, 1, 2), "provenance": {},
    }  # fmt: skip
    tokens_SL = np.arange(3, 3 + rows, dtype=np.int32).reshape(1, rows)
    sequences = fmt.Sequences(tokens_SL=tokens_SL, row_offsets=np.array([0, rows]), doc_starts=np.array([0], dtype=np.int64))
    return fmt.NewStore(layout=fmt.Layout.model_validate(values | changes), sequences=sequences)


def shard_rows(values_RD: torch.Tensor, start: int = 0) -> fmt.ShardRows:
    """These rows at layer 3; every field of a row is the number of the row, counted from `start`."""
    fields = {name: np.arange(start, start + len(values_RD), dtype=dtype) for name, dtype in fmt.ROW_FIELDS.items()}
    return fmt.ShardRows(layers={3: values_RD}, fields=fmt.RowFields(**fields))


def filled(
    folder: Path, values_RD: torch.Tensor, kept: Mapping[int, int] | None = None, **changes: object
) -> ActivationStore:
    """A store with these rows at layer 3; of a shard in `kept` only the first so many."""
    storage = LocalStorage(folder)
    fmt.create(storage, new_store(len(values_RD), **changes))
    writer = ShardWriter(storage)
    for shard in writer.missing():
        start, stop = writer.layout.shard_range(shard)
        stop = start + kept[shard] if kept else stop
        writer.write(shard, shard_rows(values_RD[start:stop], start))
    return ActivationStore(folder)


def numbered(rows: int) -> torch.Tensor:
    """Rows whose first entry is their number, exact in bfloat16 up to 256 x 256 by splitting it over two entries."""
    values_RD = torch.zeros(rows, D_IN, dtype=torch.bfloat16)
    values_RD[:, 0], values_RD[:, 1] = torch.arange(rows) % 128, torch.arange(rows) // 128
    return values_RD


def numbers(rows_RD: torch.Tensor, scale: float = 1.0) -> list[int]:
    """The numbers that rows of `numbered` have, after a factor."""
    first, second = (rows_RD[:, :2] / scale).round().long().unbind(dim=1)
    return (first + 128 * second).tolist()


def flipped(path: Path) -> None:
    """Change one bit near the beginning of a file."""
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
