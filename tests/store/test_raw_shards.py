"""Raw shards made without zarr-python's encoder are the files that it writes."""

from typing import Any, cast

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_store import CHUNK_ROWS, D_IN, SHARD_ROWS, new_store

from pipeline.store import format as fmt
from pipeline.store.direct import raw_shard


@settings(max_examples=40)
@given(rows=st.integers(1, SHARD_ROWS), dtype=st.sampled_from(["bfloat16", "float32"]), seed=st.integers(0, 9))
def test_every_byte_is_as_zarr_writes_it(rows: int, dtype: str, seed: int) -> None:
    layout = new_store(SHARD_ROWS, dtype=dtype).layout
    bits = fmt.BITS[layout.dtype]
    values_RD = torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(seed)).to(bits.torch_dtype)
    group, files = fmt.skeleton(layout)
    cast("Any", group["layer_03"])[:rows] = bits.patterns(values_RD)
    made = raw_shard(bits.patterns(values_RD), SHARD_ROWS, CHUNK_ROWS, bits.fill)
    assert made.tobytes() == files["layer_03/c/0/0"].to_bytes()
