"""What compressing real activations saves and costs, chunk by chunk, one thread.

    python benchmarks/codec.py PATH-OF-A-STORE [--layer L]

Break-even is the storage bandwidth, per core that decodes, below which the codec makes reading faster than raw bytes do.
"""

import argparse
from collections.abc import Callable
from functools import partial

import numcodecs
import numcodecs.abc
import numpy as np
import torch
from measure import interleaved, show

from pipeline.store import format as fmt
from pipeline.store.reader import ActivationStore


def blosc(cname: str, clevel: int, shuffle: int, blocksize: int) -> numcodecs.Blosc:
    """A blosc codec for 16-bit values."""
    return numcodecs.Blosc(cname=cname, clevel=clevel, shuffle=shuffle, blocksize=blocksize, typesize=2)


CODECS = {
    "zstd-1, no shuffle": numcodecs.Zstd(level=1),
    "blosc zstd-1 shuffle, automatic blocks": blosc("zstd", 1, numcodecs.Blosc.SHUFFLE, 0),
    "blosc zstd-1 shuffle, 512 KiB blocks (the store's)": blosc("zstd", 1, numcodecs.Blosc.SHUFFLE, 524288),
    "blosc zstd-5 shuffle, 512 KiB blocks": blosc("zstd", 5, numcodecs.Blosc.SHUFFLE, 524288),
    "blosc lz4-5 bitshuffle": blosc("lz4", 5, numcodecs.Blosc.BITSHUFFLE, 0),
}


def main() -> None:
    """Encode and decode the first shards' chunks with every codec."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--layer", type=int)
    parser.add_argument("--chunks", type=int, default=64)
    args = parser.parse_args()
    numcodecs.blosc.set_nthreads(1)
    store = ActivationStore(args.store)
    layer = store.layout.layers[-1] if args.layer is None else args.layer
    bits = fmt.BITS[store.layout.dtype]
    rows = [store.read(layer, *bounds) for bounds in store.chunks(store.shards)[: args.chunks]]
    chunks: list[np.ndarray] = [part_RD.view(bits.view).numpy() for part_RD in rows]
    plain = sum(chunk.nbytes for chunk in chunks)
    entropy = sum(_entropy(part_RD) for part_RD in rows) / len(rows)
    encoded = {name: [codec.encode(chunk) for chunk in chunks] for name, codec in CODECS.items()}

    def encode(codec: numcodecs.abc.Codec) -> None:
        for chunk in chunks:
            codec.encode(chunk)

    def decode(codec: numcodecs.abc.Codec, parts: list[bytes]) -> None:
        for part, chunk in zip(parts, chunks, strict=True):
            codec.decode(part, chunk)

    runs: dict[str, Callable[[], object]] = {}
    for name, codec in CODECS.items():
        runs[f"encode {name}"] = partial(encode, codec)
        runs[f"decode {name}"] = partial(decode, codec, encoded[name])
    timings = interleaved(runs, 3)
    lines = []
    for name, parts in encoded.items():
        ratio = plain / sum(len(part) for part in parts)
        write, read = (plain / timings[f"{what} {name}"].cpu_seconds / 1e6 for what in ("encode", "decode"))
        # Raw at bandwidth W takes 1/W; compressed 1/(ratio W) + 1/read.
        lines.append([name, f"{ratio:.3f}", f"{write:,.0f}", f"{read:,.0f}", f"{read * (1 - 1 / ratio):,.0f}"])
    show(
        f"{plain / 1e6:.0f} MB of layer {layer}, d_in {store.layout.d_in}; the entropy of values allows {entropy:.2f}",
        ["codec", "ratio", "encode MB / CPU s", "decode MB / CPU s", "break-even MB/s"],
        lines,
    )


def _entropy(rows_RD: torch.Tensor) -> float:
    """Compression ratio that coding every 16-bit value by itself could reach."""
    counts = np.unique(rows_RD.view(torch.uint16).numpy(), return_counts=True)[1]
    shares = counts / counts.sum()
    return 16 / float(-(shares * np.log2(shares)).sum())


if __name__ == "__main__":
    main()
