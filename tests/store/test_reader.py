"""The direct reader against zarr-python, and what it refuses."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from small_store import SHARD_ROWS, filled, flipped, new_store, numbered, shard_rows

from pipeline.artefacts.storage import LocalStorage
from pipeline.errors import BadInputError, CorruptArtefactError
from pipeline.store import format as fmt
from pipeline.store.direct import ShardedArray
from pipeline.store.reader import ActivationStore
from pipeline.store.writer import ShardWriter


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("codec", ["raw", "blosc"])
def test_the_direct_reader_and_zarr_python_read_the_same(tmp_path: Path, codec: str, dtype: str) -> None:
    values_RD = torch.randn(3 * SHARD_ROWS - 21, 8, generator=torch.Generator().manual_seed(0))
    values_RD = values_RD.to(fmt.BITS[dtype].torch_dtype)  # pyright: ignore[reportArgumentType]
    store = filled(tmp_path / "s", values_RD, codec=codec, dtype=dtype)
    for name in ("layer_03", *fmt.ROW_FIELDS):
        assert ShardedArray.open(store.storage, name)
    by_zarr = zarr.open_group(tmp_path / "s", mode="r")
    for start, stop in [(0, store.rows), (0, 16), (5, 9), (60, 70), (63, 129), (store.rows - 1, store.rows)]:
        bits = np.asarray(by_zarr["layer_03"][start:stop])  # pyright: ignore[reportIndexIssue]
        direct_RD = store.read(3, start, stop)
        assert np.array_equal(direct_RD.view(fmt.BITS[store.layout.dtype].view).numpy(), bits)
        assert torch.equal(direct_RD, values_RD[start:stop])
        for name in fmt.ROW_FIELDS:
            expected = np.asarray(by_zarr[name][start:stop])  # pyright: ignore[reportIndexIssue]
            assert np.array_equal(store.read_field(name, start, stop), expected)


def test_other_codecs_are_read_by_zarr_python(tmp_path: Path) -> None:
    values_RD = numbered(3 * SHARD_ROWS)
    filled(tmp_path / "s", values_RD)
    # The same rows as another writer might have put them there.
    zarr.create_array(
        tmp_path / "s", name="layer_03", shape=values_RD.shape, shards=(SHARD_ROWS, 8), chunks=(16, 8), dtype="uint16",
        fill_value=0xFFFF, compressors=[zarr.codecs.GzipCodec(), zarr.codecs.Crc32cCodec()], overwrite=True,
    )[:] = values_RD.view(torch.uint16).numpy()  # fmt: skip
    for path in (tmp_path / "s/commits").iterdir():
        commit = json.loads(path.read_text())
        file = f"layer_03/c/{commit['shard']}/0"
        commit["files"][file] = {"bytes": (tmp_path / "s" / file).stat().st_size, "crc32c": 0}
        del commit["seal"]  # as by a writer of earlier versions
        path.write_text(json.dumps(commit))
    store = ActivationStore(tmp_path / "s")
    assert ShardedArray.open(store.storage, "layer_03") is None
    assert torch.equal(store.read(3, 10, 150), values_RD[10:150])
    flipped(tmp_path / "s/layer_03/c/1/0")
    with pytest.raises(CorruptArtefactError, match=r"layer_03 cannot be read: .*; repair it with"):
        ActivationStore(tmp_path / "s").read(3, 64, 80)


def test_big_endian_numbers_are_not_taken_for_little_ones(tmp_path: Path) -> None:
    filled(tmp_path / "s", numbered(SHARD_ROWS))
    path = tmp_path / "s/layer_03/zarr.json"
    path.write_text(path.read_text().replace('"little"', '"big"', 1))
    assert ShardedArray.open(LocalStorage(tmp_path / "s"), "layer_03") is None


def test_a_store_being_written_is_refused_and_readable_in_part(tmp_path: Path) -> None:
    fmt.create(LocalStorage(tmp_path), new_store(4 * SHARD_ROWS))
    writer, values_RD = ShardWriter(LocalStorage(tmp_path)), numbered(4 * SHARD_ROWS)
    for shard in (1, 3):
        start, stop = writer.layout.shard_range(shard)
        writer.write(shard, shard_rows(values_RD[start:stop], start))
    with pytest.raises(CorruptArtefactError, match="shards 0, 2 are not committed"):
        ActivationStore(tmp_path)
    store = ActivationStore(tmp_path, partial=True)
    assert store.shards == [1, 3]
    assert store.rows == 2 * SHARD_ROWS
    assert torch.equal(store.read(3, 64, 128), values_RD[64:128])
    with pytest.raises(IndexError, match="rows 128 to 192 were not written"):
        store.read(3, 100, 200)


def test_a_layer_that_is_not_there_is_no_damage(tmp_path: Path) -> None:
    store = filled(tmp_path, numbered(SHARD_ROWS))
    for ask in (lambda: store.read(7, 0, 1), lambda: store.scale(7)):
        with pytest.raises(BadInputError, match="has no layer 7; it has 3"):
            ask()


def test_a_record_of_other_bytes_is_not_passed_over(tmp_path: Path) -> None:
    fmt.create(LocalStorage(tmp_path), new_store(SHARD_ROWS))
    one, other = ShardWriter(LocalStorage(tmp_path)), ShardWriter(LocalStorage(tmp_path))
    values_RD = numbered(SHARD_ROWS)
    record = one.write(0, shard_rows(values_RD))
    assert other.write(0, shard_rows(values_RD)) == record
    with pytest.raises(CorruptArtefactError, match="shard 0 was written by two machines that compute different bytes"):
        other.write(0, shard_rows(values_RD * 2))
    assert other.missing() == [0]
    one.write(0, shard_rows(values_RD))
    assert torch.equal(ActivationStore(tmp_path).read(3, 0, SHARD_ROWS), values_RD)
