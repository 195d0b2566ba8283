"""Damage to any file of a store is named, never read as data, and repaired by making again only what was damaged."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from faulty import Extraction, files_of, many_shards
from small_study import Study
from typer.testing import CliRunner

from pipeline.artefacts.manifest import MANIFEST
from pipeline.cli import app
from pipeline.errors import CorruptArtefactError
from pipeline.extract.extraction import extract
from pipeline.store import format as fmt
from pipeline.store.reader import ActivationStore
from pipeline.store.verify import damages

Harm = Callable[[Path], object]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 7)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def change_a_digit(path: Path) -> None:
    """A change that leaves the JSON as valid as it was."""
    text = path.read_text()
    place = max(index for index, letter in enumerate(text) if letter in "2345678")
    path.write_text(text[:place] + str(int(text[place]) + 1) + text[place + 1 :])


def garbage(path: Path) -> None:
    path.write_bytes(b"{" + path.read_bytes()[1:-1] + b"\xff")


@pytest.fixture(scope="module")
def by_codec(study: Study, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Extraction]:
    """Finished studies of four shards. Read only."""
    made = {}
    for codec in ("raw", "blosc"):
        small = (("tokens = 10_000", "tokens = 2_000"), ("[store]", f'[store]\ncodec = "{codec}"'))
        made[codec] = many_shards(study, tmp_path_factory.mktemp(codec), *small)
        extract(made[codec].plan, made[codec].workspace)
    return made


def read_all(store: ActivationStore) -> None:
    for layer in store.layout.layers:
        store.read(layer, 0, store.rows)
    for name in fmt.ROW_FIELDS:
        store.read_field(name, 0, store.rows)
    for name in fmt.text_arrays(store.layout):
        store.whole(name)
        array = store.array(name)
        array.read(0, len(array))


def verified(folder: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["store", "verify", str(folder), *options])
    return result.exit_code, result.output


@pytest.mark.parametrize("harm", [Path.unlink, truncate, empty, flip])
@pytest.mark.parametrize("file", ["layer_02/c/1/0", "position/c/1"])
@pytest.mark.parametrize("codec", ["raw", "blosc"])
def test_a_damaged_shard_is_named_and_alone_made_again(
    by_codec: dict[str, Extraction], codec: str, file: str, harm: Harm, tmp_path: Path
) -> None:
    extraction = by_codec[codec].copy(tmp_path / "ws")
    before = files_of(extraction.workspace.local)
    harm(extraction.store / file)
    if harm is flip:
        # Its size is right, so it is found by whoever reads it.
        store = ActivationStore(extraction.store)
        with pytest.raises(CorruptArtefactError, match=rf"{file}: .* does not match its checksum; repair it with"):
            read_all(store)
        assert verified(extraction.store)[0] == 0
    else:
        with pytest.raises(CorruptArtefactError, match=rf"{file} (is missing|has \d+ bytes instead of \d+); repair it with"):
            ActivationStore(extraction.store)
        assert verified(extraction.store)[0] == 1
    code, said = verified(extraction.store, "--deep")
    assert code == 1
    assert f"damaged: {file}" in said
    assert "1 files damaged" in said

    untouched = [path for path in extraction.store.rglob("c/*") if path.is_file() and path.name != "1"]
    inodes = {path: path.stat().st_ino for path in untouched}
    assert extract(extraction.plan, extraction.workspace, deep=harm is flip) == [extraction.plan.store]
    assert files_of(extraction.workspace.local) == before
    assert {path: path.stat().st_ino for path in untouched} == inodes
    read_all(ActivationStore(extraction.store))
    assert verified(extraction.store, "--deep")[0] == 0


@pytest.mark.parametrize(
    ("file", "harm", "of_the_same_size"),
    [
        ("commits/000001.json", Path.unlink, False),
        ("commits/000001.json", truncate, False),
        ("commits/000001.json", garbage, True),
        ("commits/000001.json", change_a_digit, True),
        ("zarr.json", Path.unlink, False),
        ("zarr.json", empty, False),
        ("zarr.json", garbage, True),
        ("zarr.json", change_a_digit, True),
        ("layer_01/zarr.json", Path.unlink, False),
        ("layer_01/zarr.json", garbage, True),
        ("layer_01/zarr.json", change_a_digit, True),
        ("tokens/zarr.json", truncate, False),
        ("tokens/c/0/0", Path.unlink, False),
        ("tokens/c/0/0", empty, False),
        ("tokens/c/0/0", flip, True),
        ("row_offsets/c/0", flip, True),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_damage_beside_the_shards_is_named_and_repaired(
    by_codec: dict[str, Extraction], file: str, harm: Harm, of_the_same_size: bool, finished: bool, tmp_path: Path
) -> None:
    extraction = by_codec["raw"].copy(tmp_path / "ws")
    before = files_of(extraction.workspace.local)
    if not finished:
        (extraction.store / MANIFEST).unlink()
        if file.startswith("commits/") and harm is Path.unlink:
            return  # a shard still to be made
    harm(extraction.store / file)
    found = damages(extraction.workspace.storage(extraction.plan.store), deep=True)
    assert any(file.startswith(damage.file) for damage in found)
    # What the reader does not use, and no manifest tells, is another matter.
    if finished or harm is not change_a_digit or file.startswith("commits/"):
        with pytest.raises(CorruptArtefactError):
            read_all(ActivationStore(extraction.store))
    code, said = verified(extraction.store, "--deep")
    assert code == 1
    assert "damaged: " in said
    shards = {path: path.stat().st_ino for path in extraction.store.glob("layer_*/c/[023]/0")}
    assert len(shards) == 6
    deep = of_the_same_size or not finished
    assert extract(extraction.plan, extraction.workspace, deep=deep) == [extraction.plan.store]
    assert files_of(extraction.workspace.local) == before
    assert {path: path.stat().st_ino for path in shards} == shards
    assert verified(extraction.store, "--deep") == (0, "no damage (every checksum compared)\n")


def test_damaged_text_does_not_get_into_a_manifest(
    by_codec: dict[str, Extraction], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extraction = by_codec["raw"].copy(tmp_path / "ws")
    before = files_of(extraction.workspace.local)
    (extraction.store / MANIFEST).unlink()
    flip(extraction.store / "tokens/c/0/0")
    assert extract(extraction.plan, extraction.workspace) == [extraction.plan.store]
    assert "tokens/c/0/0 is not as it was written" in capsys.readouterr().err
    assert files_of(extraction.workspace.local) == before


@pytest.mark.parametrize("harm", [Path.unlink, garbage, empty])
def test_a_lost_manifest_costs_nothing(by_codec: dict[str, Extraction], harm: Harm, tmp_path: Path) -> None:
    extraction = by_codec["raw"].copy(tmp_path / "ws")
    before = {path: path.stat().st_ino for path in extraction.store.rglob("*") if path.is_file() and path.name != MANIFEST}
    harm(extraction.store / MANIFEST)
    if harm is not Path.unlink:
        with pytest.raises(CorruptArtefactError, match=r"manifest\.json cannot be read; repair it with"):
            ActivationStore(extraction.store)
        assert verified(extraction.store)[0] == 1
    assert extract(extraction.plan, extraction.workspace) == [extraction.plan.store]
    assert {path: path.stat().st_ino for path in before} == before
    assert extraction.workspace.manifest(extraction.plan.store)


def test_a_store_is_described_whether_or_not_it_is_finished(by_codec: dict[str, Extraction], tmp_path: Path) -> None:
    extraction = by_codec["blosc"].copy(tmp_path / "ws")
    described = CliRunner().invoke(app, ["store", "info", str(extraction.store)]).output
    assert "2,000 in 4 of 4 shards" in described
    assert "bfloat16, blosc" in described
    (extraction.store / MANIFEST).unlink()
    (extraction.store / "commits/000000.json").unlink()
    assert "1,488 in 3 of 4 shards" in CliRunner().invoke(app, ["store", "info", str(extraction.store)]).output
