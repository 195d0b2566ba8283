import dataclasses
import shutil
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from small_store import D_IN, SHARD_ROWS, filled, flipped, new_store, numbered, numbers, shard_rows

from pipeline.artefacts.storage import LocalStorage
from pipeline.errors import BadInputError, CorruptArtefactError, PipelineError
from pipeline.store import format as fmt
from pipeline.store.batches import rows_in_order, shuffled_batches, split_shards
from pipeline.store.documents import Documents
from pipeline.store.reader import ActivationStore
from pipeline.store.verify import damages
from pipeline.store.writer import ShardWriter, commit_name


@pytest.mark.parametrize("codec", ["raw", "blosc"])
def test_every_finite_bit_pattern_of_bfloat16_survives(tmp_path: Path, codec: str) -> None:
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    patterns = every[every.isfinite()].reshape(-1, D_IN)
    assert patterns.numel() == 65536 - 2 * 128
    store = filled(tmp_path / "s", patterns, codec=codec, shard_rows=4096)
    back = store.read(3, 0, len(patterns))
    assert back.dtype == torch.bfloat16
    assert torch.equal(back.view(torch.uint16), patterns.view(torch.uint16))


def test_float32_survives_too(tmp_path: Path) -> None:
    values = torch.randn(100, D_IN)
    assert torch.equal(filled(tmp_path / "s", values, dtype="float32").read(3, 0, 100), values)


def test_another_dtype_is_refused_rather_than_converted(tmp_path: Path) -> None:
    fmt.create(LocalStorage(tmp_path), new_store(SHARD_ROWS))
    writer = ShardWriter(LocalStorage(tmp_path))
    values = torch.ones(SHARD_ROWS, D_IN)
    with pytest.raises(TypeError, match="the store holds bfloat16"):
        writer.write(0, shard_rows(values))
    assert writer.missing() == [0]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_never_committed(tmp_path: Path, value: float) -> None:
    fmt.create(LocalStorage(tmp_path), new_store(SHARD_ROWS))
    writer = ShardWriter(LocalStorage(tmp_path))
    values = numbered(SHARD_ROWS)
    values[5, 3] = value
    with pytest.raises(PipelineError, match="values that are not finite for sequence 5 of the store"):
        writer.write(0, shard_rows(values))
    assert writer.missing() == [0]


def test_a_store_is_whole_or_refused(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    filled(whole, numbered(200))
    for case, harm in {
        "shards 2 are not committed": lambda folder: (folder / commit_name(2)).unlink(),
        "is missing": lambda folder: (folder / "layer_03/c/1/0").unlink(),
        "bytes instead of": lambda folder: (folder / "layer_03/c/1/0").write_bytes(b""),
        "not an activation store": lambda folder: (folder / "zarr.json").unlink(),
    }.items():
        folder = tmp_path / "harmed"
        shutil.copytree(whole, folder)
        harm(folder)
        with pytest.raises(CorruptArtefactError, match=case):
            ActivationStore(folder)
        shutil.rmtree(folder)


@pytest.mark.parametrize("codec", ["raw", "blosc"])
def test_a_flipped_bit_is_found_when_it_is_read(tmp_path: Path, codec: str) -> None:
    filled(tmp_path / "s", numbered(200), codec=codec)
    flipped(tmp_path / "s/layer_03/c/1/0")
    store = ActivationStore(tmp_path / "s")
    assert len(store.read(3, 0, SHARD_ROWS)) == SHARD_ROWS
    with pytest.raises(CorruptArtefactError, match="layer_03/c/1/0: chunk 0 does not match its checksum"):
        store.read(3, 64, 80)


def test_an_interrupted_layout_is_seen_and_made_anew(tmp_path: Path) -> None:
    fmt.create(LocalStorage(tmp_path), new_store(200))
    assert fmt.is_laid_out(LocalStorage(tmp_path))
    (tmp_path / "zarr.json").unlink()
    assert not fmt.is_laid_out(LocalStorage(tmp_path))
    fmt.create(LocalStorage(tmp_path), new_store(300))
    assert ShardWriter(LocalStorage(tmp_path)).layout.rows == 300


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("zarr.json", b'"seed": 0', b'"seed": 1'),
        ("tokens/zarr.json", b'"chunk_grid"', b'"chunk_grid" '),
        ("tokens/c/0/0", b"", b"x"),
    ],
)
def test_what_an_unfinished_store_says_of_itself_is_compared_before_it_is_gone_on_with(
    tmp_path: Path, name: str, old: bytes, new: bytes
) -> None:
    storage, store = LocalStorage(tmp_path), new_store(3 * SHARD_ROWS)
    fmt.create(storage, store)
    written = {name: storage.read(name) for name in storage.sizes()}
    assert not damages(storage, deep=False)
    changed = written[name].replace(old, new, 1)
    assert changed != written[name]
    storage.write(name, changed)
    assert [damage.file for damage in damages(storage, deep=False)] == [name]


@pytest.mark.parametrize("codec", ["raw", "blosc"])
def test_threads_write_shards_of_one_store_at_the_same_time(tmp_path: Path, codec: str) -> None:
    values_RD = numbered(8 * SHARD_ROWS)
    expected = filled(tmp_path / "one", values_RD, codec=codec)
    storage = LocalStorage(tmp_path / "many")
    fmt.create(storage, new_store(len(values_RD), codec=codec))
    writer = ShardWriter(storage)

    def write(shard: int) -> None:
        start, stop = writer.layout.shard_range(shard)
        writer.write(shard, shard_rows(values_RD[start:stop], start))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, writer.missing()))
    assert {name: storage.read(name) for name in storage.sizes()} == {
        name: expected.storage.read(name) for name in expected.storage.sizes()
    }


def test_rows_never_written_do_not_look_like_activations(tmp_path: Path) -> None:
    fmt.create(LocalStorage(tmp_path), new_store(SHARD_ROWS))
    bits = np.asarray(zarr.open_array(tmp_path, path="layer_03", mode="r")[0:4])
    assert torch.from_numpy(bits).view(torch.bfloat16).isnan().all()


def test_the_scale_makes_the_mean_square_norm_one(tmp_path: Path) -> None:
    values = torch.randn(200, D_IN).bfloat16()
    store = filled(tmp_path / "s", values)
    assert torch.isclose((values.float() * store.scale(3)).square().sum(dim=1).mean(), torch.tensor(1.0), rtol=1e-5)


def test_one_pass_of_batches_has_every_row_once_and_no_held_out_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.store.batches.FEWEST_HELDOUT", 54)
    store = filled(tmp_path / "s", numbered(5 * SHARD_ROWS - 10))
    training, heldout = split_shards(store, 1)
    assert (training, heldout) == ([0, 1, 2, 3], [4])
    # 4 shards of 64 rows are 32 batches of 8; 6 chunks to a buffer of 96 rows do not divide the pass evenly.
    batches = list(islice(shuffled_batches(store, 3, training, batch_size=8, buffer_chunks=6, seed=1), 32))
    seen = [number for batch in batches for number in numbers(batch, store.scale(3))]
    assert Counter(seen) == Counter(range(4 * SHARD_ROWS))
    assert seen != sorted(seen)
    again = list(islice(shuffled_batches(store, 3, training, batch_size=8, buffer_chunks=6, seed=1), 32))
    assert all(torch.equal(one, other) for one, other in zip(batches, again, strict=True))
    other = next(shuffled_batches(store, 3, training, batch_size=8, buffer_chunks=6, seed=2))
    assert not torch.equal(other, batches[0])


def test_batches_larger_than_a_buffer_lose_nothing(tmp_path: Path) -> None:
    store = filled(tmp_path / "s", numbered(4 * SHARD_ROWS))
    batches = islice(shuffled_batches(store, 3, [0, 1, 2], batch_size=48, buffer_chunks=2, seed=0), 4)
    seen = [number for batch in batches for number in numbers(batch, store.scale(3))]
    assert Counter(seen) == Counter(range(3 * SHARD_ROWS))


def test_rows_in_order_are_the_store_unscaled(tmp_path: Path) -> None:
    store = filled(tmp_path / "s", numbered(3 * SHARD_ROWS - 5))
    assert numbers(torch.cat(list(rows_in_order(store, 3, [1, 2])))) == list(range(64, 187))


def test_a_store_with_nothing_to_train_on_says_so(tmp_path: Path) -> None:
    store = filled(tmp_path / "s", numbered(SHARD_ROWS))
    with pytest.raises(BadInputError, match="heldout_shards 1 leaves nothing to train on: the store has 1 shards"):
        split_shards(store, 1)
    with pytest.raises(BadInputError, match="batch_size 65 is more than the 64 rows"):
        next(shuffled_batches(store, 3, [0], batch_size=65, buffer_chunks=4, seed=0))


def test_documents_come_back_padded_by_class(tmp_path: Path) -> None:
    lengths = [2, 3, 1, 4, 2, 5]
    tokens_SL = np.full((6, 6), 0, dtype=np.int32)
    for index, length in enumerate(lengths):
        tokens_SL[index, 1 : 1 + length] = 7
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    base = new_store(sum(lengths), row_order="document", classes=("one", "two"))
    label, split = np.array([0, 0, 1, 0, 1, 1], dtype=np.int32), np.array([0, 0, 0, 1, 1, 1], dtype=np.uint8)
    labels = fmt.Labels(label=label, split=split)
    sequences = fmt.Sequences(tokens_SL=tokens_SL, row_offsets=offsets, doc_starts=np.arange(6) * 6)
    fmt.create(LocalStorage(tmp_path), fmt.NewStore(layout=base.layout, sequences=sequences, labels=labels))
    writer = ShardWriter(LocalStorage(tmp_path))
    values = numbered(sum(lengths))
    writer.write(0, shard_rows(values))
    documents = Documents(ActivationStore(tmp_path), 3)
    train, test = dict(documents.padded("train", 2)), dict(documents.padded("test", 2))
    assert {name: tuple(acts.shape) for name, acts in train.items()} == {"one": (2, 6, D_IN), "two": (1, 6, D_IN)}
    assert numbers(train["one"][1, 1:4].float()) == [2, 3, 4]
    assert numbers(test["two"][1, 1:6].float()) == [12, 13, 14, 15, 16]
    assert not train["one"][:, 0].any()
    assert not train["one"][0, 3:].any()
    assert [(name, len(acts)) for name, acts in documents.padded("train", 1)] == [("one", 1), ("one", 1), ("two", 1)]
    assert torch.equal(torch.cat([acts for name, acts in documents.padded("train", 1) if name == "one"]), train["one"])


def test_whole_arrays_of_zeros_are_there(tmp_path: Path) -> None:
    new = new_store(SHARD_ROWS)
    zeros = np.zeros(9000, dtype=np.int32)
    fmt.create(
        LocalStorage(tmp_path), dataclasses.replace(new, labels=fmt.Labels(label=zeros, split=zeros.astype(np.uint8)))
    )
    store = ActivationStore(tmp_path, partial=True)
    assert (store.whole("label") == 0).all()
    assert (store.whole("split") == 0).all()
