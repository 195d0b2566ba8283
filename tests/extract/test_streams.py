"""The store of a stream: what it keeps, who can read it, and that other stores do not notice."""

from pathlib import Path

import pytest
from grown_study import Grown
from small_store import flipped
from streamed_study import HELDOUT, SHARD, SHARDS, TOKENS, WINDOW, noting, streamed_plan, weights
from typer.testing import CliRunner

from pipeline.artefacts.manifest import MANIFEST
from pipeline.artefacts.workspace import RING, Workspace
from pipeline.cli import app
from pipeline.evaluate.evaluation import evaluate
from pipeline.extract.estimate import describe
from pipeline.extract.extraction import extract, row_maker
from pipeline.report.collect import collect
from pipeline.store import format as fmt
from pipeline.store.reader import ActivationStore
from pipeline.store.verify import damages
from pipeline.study.gpu_hours import predict, rows_of
from pipeline.study.litter import litter, remove
from pipeline.study.plan import Plan
from pipeline.study.status import Status
from pipeline.train.training import train

KEPT = [0, 1, 9, 10]
ROWS = 3 * SHARD + SHARD - 100


@pytest.fixture(autouse=True)
def _no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.extract.extraction.describe", lambda _plan: "")  # it measures the machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("streams")
    Grown.made(made)
    return made


@pytest.fixture
def streamed(folder: Path, tmp_path: Path) -> tuple[Plan, Workspace]:
    plan, workspace = streamed_plan(folder, "language", "stream"), Workspace(tmp_path / "workspace")
    extract(plan, workspace)
    return plan, workspace


def test_it_has_what_is_held_out_and_the_first_window_and_says_so(streamed: tuple[Plan, Workspace]) -> None:
    plan, workspace = streamed
    storage = workspace.storage(plan.store)
    store = ActivationStore(storage)
    assert store.shards == KEPT
    assert store.every_shard == list(range(SHARDS))
    assert store.rows == ROWS
    assert store.rows_of(store.every_shard) == TOKENS
    facts = workspace.require(plan.store, "").facts
    assert (facts["rows"], facts["streamed"]) == (ROWS, TOKENS - ROWS)
    assert facts["bytes"] == sum(size for name, size in storage.sizes().items() if name in _data(store))
    assert damages(storage, deep=True) == []
    info = CliRunner().invoke(app, ["store", "info", str(storage)]).output
    assert f"{ROWS:,} in 4 of 11 shards" in info
    assert "7 shards, made while training" in info
    assert Status(plan, workspace).found[plan.store.path].detail == f"{ROWS:,} rows, {TOKENS - ROWS:,} streamed"
    assert extract(plan, workspace) == []


def _data(store: ActivationStore) -> set[str]:
    return {name for commit in store.commits.values() for name in commit.files}


def test_a_damaged_shard_is_mended_and_an_unfinished_store_goes_on(streamed: tuple[Plan, Workspace]) -> None:
    plan, workspace = streamed
    storage = workspace.storage(plan.store)
    flipped(workspace.folder(plan.store) / fmt.layer_file(1, 9))
    assert [damage.shard for damage in damages(storage, deep=True)] == [9]
    assert extract(plan, workspace, deep=True) == [plan.store]
    assert damages(storage, deep=True) == []
    workspace.reopen(plan.store)
    storage.delete("commits/000001.json")
    assert Status(plan, workspace).found[plan.store.path].detail == "3 of 4 shards"
    assert extract(plan, workspace) == [plan.store]


def test_a_store_and_its_stream_take_over_from_each_other(folder: Path, streamed: tuple[Plan, Workspace]) -> None:
    _, workspace = streamed
    whole = streamed_plan(folder, "language", "keep")
    extract(whole, workspace)
    kept = ActivationStore(workspace.storage(whole.store))
    shared = [shard for shard in kept.shards if (kept.storage.root / fmt.layer_file(1, shard)).stat().st_nlink > 1]
    assert shared == KEPT
    # SAEs are not taken over from a stream: nothing tells which rows they saw.
    train(streamed[0], workspace, row_maker=row_maker)
    train(whole, workspace)
    assert all(workspace.require(sae.artefact, "").facts["seconds"] >= 0 for sae in whole.saes)
    assert weights(whole, workspace) == weights(streamed[0], workspace)


def test_a_whole_study_is_evaluated_and_reported_as_from_a_store(folder: Path, tmp_path: Path) -> None:
    found: list[dict[str, bytes]] = []
    for mode in ("keep", "stream"):
        plan, workspace = streamed_plan(folder, "synthetic", mode), Workspace(tmp_path / mode)
        extract(plan, workspace)
        train(plan, workspace, row_maker=row_maker)
        evaluate(plan, workspace)
        results = collect(plan, workspace)
        assert results.training.heldout_rows == HELDOUT * SHARD - 100
        folders = [workspace.folder(sae.evaluation) for sae in plan.saes]
        found.append(
            {
                f"{each.name[:4]} {path.name}": path.read_bytes()
                for each in folders
                for path in each.iterdir()
                if path.name != MANIFEST
            }
        )
        streamed = f"{TOKENS - ROWS:,} more rows to train on were made while training and are not kept"
        assert (streamed in results.store.remarks) == (mode == "stream")
    assert "full reconstruction.json" in found[0]
    assert found[0] == found[1]


def test_its_key_says_what_it_keeps_and_other_keys_do_not_change(folder: Path) -> None:
    keep, stream = (streamed_plan(folder, "synthetic", mode) for mode in ("keep", "stream"))
    assert stream.store.inputs["kept"] == {"heldout_shards": HELDOUT, "window_shards": WINDOW}
    assert "mode" not in keep.store.inputs["store"]
    assert "kept" not in keep.store.inputs
    assert keep.store.key != stream.store.key


def test_a_ring_that_a_killed_run_left_is_found_and_removed(streamed: tuple[Plan, Workspace]) -> None:
    plan, workspace = streamed
    ring = workspace.ring(plan.store)
    ring.write("commits/000003.json", b"{}")
    extract(plan, workspace)  # a ring is no part of the store
    (found,) = [one for one in litter(workspace, [plan]) if one.path.endswith(RING)]
    assert found.path == f"{plan.store.path}/{RING}"
    with workspace.claim(plan.store, "reader-0"):
        assert not [one for one in litter(workspace, [plan]) if one.path.endswith(RING)]
        assert list(remove(workspace, [found])) == []
    assert list(remove(workspace, [found])) == [found]
    assert not ring.root.exists()
    # Also where the manifest is written while there is a ring.
    ring.write("commits/000003.json", b"{}")
    workspace.reopen(plan.store)
    extract(plan, workspace)
    assert not any(name.startswith(RING) for name in workspace.require(plan.store, "").files)


def test_nobody_is_fed_who_does_not_read(streamed: tuple[Plan, Workspace], monkeypatch: pytest.MonkeyPatch) -> None:
    plan, workspace = streamed
    monkeypatch.setattr("pipeline.store.ring.PATIENCE", 0.1)
    fed = CliRunner().invoke(app, ["feed", plan.experiment.argument, "--workspace", str(workspace.root)])
    assert "feed: 0 shards made" in fed.output
    assert not workspace.ring(plan.store).root.exists()


def test_what_it_will_take_is_told_before(folder: Path) -> None:
    keep, stream = (streamed_plan(folder, "language", mode) for mode in ("keep", "stream"))
    rows = rows_of(stream.experiment)
    assert rows.kept == 4 * SHARD
    assert rows.ring == 2 * WINDOW * SHARD
    assert rows.streamed == stream.experiment.train.steps * 64 * 7 // 9
    said = describe(stream)
    assert f"{TOKENS:,} rows in 11 shards, {rows.kept:,} of them kept" in said
    assert f"{rows.streamed:,} rows are made for each group of SAEs that trains together" in said
    assert "streamed" not in describe(keep)
    assert rows_of(keep.experiment).kept == TOKENS
    assert predict(stream).train > predict(keep).train
    assert predict(stream).disk < predict(keep).disk
    assert predict(stream).extract < predict(keep).extract


def test_a_window_that_holds_all_leaves_nothing_to_make(folder: Path, tmp_path: Path) -> None:
    plan = streamed_plan(folder, "synthetic", "stream", f"window_shards = {WINDOW}", "window_shards = 20")
    workspace, made = Workspace(tmp_path / "workspace"), list[int]()
    extract(plan, workspace)
    assert ActivationStore(workspace.storage(plan.store)).shards == list(range(SHARDS))
    assert len(train(plan, workspace, row_maker=noting(made.append)).made) == 2
    assert made == []
