"""What it costs to read a store: CPU seconds per GB against the alternatives, how long a trainer waits, and memory.

    python benchmarks/reading.py [--rows 131072]

GB are of bfloat16 rows, whatever the format holds. Everything is in the page cache: this measures software, not disks.
"""

import argparse
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from datasets import Array2D, Dataset, Features, disable_progress_bars, load_from_disk
from measure import interleaved, peak_memory, reset_peak_memory, show

from pipeline.artefacts.storage import LocalStorage
from pipeline.store import format as fmt
from pipeline.store.batches import shuffled_batches
from pipeline.store.reader import ActivationStore
from pipeline.store.writer import ShardWriter
from pipeline.study.recipe import TrainConfig
from pipeline.train.step import Trainer

D_IN, CONTEXT = 2304, 128
CHUNK_ROWS = 1024
LAYER = 12


def make_store(folder: Path, rows_RD: torch.Tensor, codec: str) -> ActivationStore:
    """A store of one layer with shards of 32,768 rows."""
    rows = len(rows_RD)
    layout = fmt.Layout.model_validate(
        {
            "rows": rows, "shard_rows": 32768, "chunk_rows": CHUNK_ROWS, "layers": (LAYER,), "d_in": D_IN,
            "dtype": "bfloat16", "codec": codec, "row_order": "shuffled", "seed": 0, "special_ids": (), "provenance": {},
        }
    )  # fmt: skip
    tokens_SL = np.zeros((1, rows), np.int32)
    sequences = fmt.Sequences(tokens_SL=tokens_SL, row_offsets=np.array([0, rows]), doc_starts=np.array([0]))
    storage = LocalStorage(folder)
    fmt.create(storage, fmt.NewStore(layout=layout, sequences=sequences))
    writer = ShardWriter(storage)
    for shard in range(layout.shards):
        start, stop = layout.shard_range(shard)
        numbers = fmt.RowFields(**dict.fromkeys(fmt.ROW_FIELDS, np.arange(start, stop)))
        writer.write(shard, fmt.ShardRows(layers={LAYER: rows_RD[start:stop]}, fields=numbers))
    return ActivationStore(folder)


def residual_like(rows: int) -> torch.Tensor:
    """Rows with a common mean, a few loud directions and a decaying spectrum: as compressible as a residual stream."""
    generator = torch.Generator().manual_seed(0)
    scale_D = torch.logspace(0.5, -1, D_IN)[torch.randperm(D_IN, generator=generator)]
    mean_D = 4 * torch.randn(D_IN, generator=generator) * scale_D
    return torch.cat(
        [(torch.randn(8192, D_IN, generator=generator) * scale_D + mean_D).bfloat16() for _ in range(rows // 8192)]
    )


def arrow_cache(folder: Path, rows_RD: torch.Tensor) -> Any:
    """The same rows as SAELens caches them: contexts of float32 in Arrow, read in torch format."""
    contexts = rows_RD.float().reshape(-1, CONTEXT, D_IN)
    features = Features({"activations": Array2D(shape=(CONTEXT, D_IN), dtype="float32")})
    disable_progress_bars()
    Dataset.from_dict({"activations": contexts.numpy()}, features=features).save_to_disk(str(folder))
    return load_from_disk(str(folder)).with_format("torch", dtype=torch.float32)


def reading(folder: Path, rows: int, rounds: int) -> None:
    """CPU seconds per GB of every reader."""
    rows_RD = residual_like(rows)
    gigabytes = rows * D_IN * 2 / 1e9
    stores = {codec: make_store(folder / codec, rows_RD, codec) for codec in ("raw", "blosc")}
    rows_RD.view(torch.uint16).numpy().tofile(folder / "plain")
    mapped = np.memmap(folder / "plain", np.uint16, mode="r", shape=(rows, D_IN))
    few = 256 * CONTEXT  # of the slow one only a part, in proportion
    cache = arrow_cache(folder / "arrow", rows_RD[:few])
    chunks = stores["raw"].chunks(stores["raw"].shards)
    order = [chunks[index] for index in np.random.default_rng(0).permutation(len(chunks))]
    out_RD = torch.empty(CHUNK_ROWS, D_IN, dtype=torch.bfloat16)
    bits_RD = out_RD.view(torch.uint16).numpy()

    def copy_mapped() -> None:
        for start, stop in order:
            bits_RD[: stop - start] = mapped[start:stop]

    def direct(codec: str) -> None:
        for start, stop in order:
            stores[codec].read(LAYER, start, stop, out_RD)

    def by_zarr(codec: str) -> None:
        array = zarr.open_array(stores[codec].storage.zarr_store(), path=fmt.layer_array(LAYER), mode="r")
        for start, stop in order:
            bits_RD[:] = array[start:stop]

    def by_arrow() -> None:
        contexts = CHUNK_ROWS // CONTEXT
        for chunk in np.random.default_rng(0).permutation(len(cache) // contexts).tolist():
            cache[chunk * contexts : (chunk + 1) * contexts]["activations"]

    timings = interleaved(
        {
            "np.memmap, copied": copy_mapped,
            "direct reader, raw + crc32c": partial(direct, "raw"),
            "direct reader, blosc + crc32c": partial(direct, "blosc"),
            "zarr-python, raw + crc32c": partial(by_zarr, "raw"),
            "zarr-python, blosc + crc32c": partial(by_zarr, "blosc"),
            "Arrow float32 cache, torch format": by_arrow,
        },
        rounds,
    )
    per_gb = {name: timing.cpu_seconds / gigabytes for name, timing in timings.items()}
    per_gb["Arrow float32 cache, torch format"] *= rows / few
    floor = per_gb["np.memmap, copied"]
    show(
        f"Reading {gigabytes:.2f} GB in chunks of 1,024 rows, random order",
        ["reader", "CPU s / GB", "x memmap"],
        [[name, f"{value:.3f}", f"{value / floor:.2f}"] for name, value in per_gb.items()],
    )
    raw = per_gb["direct reader, raw + crc32c"]
    show(
        "Bars",
        ["direct reader, raw, against", "ratio", "at most"],
        [
            ["np.memmap", f"{raw / floor:.2f}", "3.5"],
            ["zarr-python", f"{raw / per_gb['zarr-python, raw + crc32c']:.2f}", "0.5"],
            ["Arrow cache", f"{raw / per_gb['Arrow float32 cache, torch format']:.4f}", "0.05"],
        ],
    )
    sizes = {codec: store.bytes for codec, store in stores.items()}
    show("Codec on these rows", ["", "ratio"], [["raw / blosc bytes", f"{sizes['raw'] / sizes['blosc']:.3f}"]])


def waiting(store: ActivationStore, steps: int) -> None:
    """How much of a trainer's time goes into waiting for its next batch, and what the stream holds in memory."""
    chunks = 32
    config = TrainConfig(d_sae=D_IN, steps=steps, batch_size=2048, contrast=None, resets=None, lr_warmup=0, l1_warmup=0)
    trainer = Trainer(config=config, d_in=D_IN, seed=0)
    shards = store.shards
    batches = shuffled_batches(store, LAYER, shards, batch_size=2048, buffer_chunks=chunks, seed=0)
    trainer.step(next(batches))
    waited = stepped = 0.0
    for _ in range(steps):
        began = time.perf_counter()
        x_BD = next(batches)
        waited += time.perf_counter() - began
        began = time.perf_counter()
        trainer.step(x_BD)
        stepped += time.perf_counter() - began
    del batches
    reset_peak_memory()
    before = peak_memory()
    for _ in islice(shuffled_batches(store, LAYER, shards, batch_size=2048, buffer_chunks=chunks, seed=0), 100):
        pass
    used, buffers = peak_memory() - before, 2 * chunks * CHUNK_ROWS * D_IN * 2
    show(
        f"A trainer (B 2048, F {D_IN}) and its stream",
        ["", "measured", "at most"],
        [
            ["waits, share of step time", f"{waited / stepped:.2%}", "2 %"],
            [f"memory above its two buffers of {buffers / 2e6:.0f} MB", f"{(used - buffers) / 1e6:.0f} MB", "300 MB"],
        ],
    )


def main() -> None:
    """Run both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=131072)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reading(Path(folder), args.rows, args.rounds)
        waiting(ActivationStore(Path(folder) / "raw"), args.steps)


if __name__ == "__main__":
    main()
