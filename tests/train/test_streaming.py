"""Training from a stream: the weights of a store, a bounded ring on disk, shared by processes, and safe to kill."""

import signal
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from faulty import forked
from grown_study import Grown
from streamed_study import (
    BATCH,
    SHARD,
    STEPS,
    TRAINED,
    WINDOW,
    noted,
    noting,
    streamed_plan,
    together,
    train_here,
    weights,
)

from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError
from pipeline.extract.extraction import extract, row_maker
from pipeline.store import format as fmt
from pipeline.store.batches import split_shards
from pipeline.store.order import Order
from pipeline.store.reader import ActivationStore
from pipeline.study.plan import Plan
from pipeline.train import checkpoint
from pipeline.train.training import train

KEPT = {0, 1}
PASS = TRAINED * SHARD // BATCH
"""Steps of a pass."""
PASSES = -(-STEPS // PASS)
Streamed = tuple[Plan, Workspace]


@pytest.fixture(autouse=True)
def _no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.extract.extraction.describe", lambda _plan: "")  # it measures the machine


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("streamed")
    Grown.made(made)
    return made


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, bytes]:
    """The weights of the study of a language model, trained from a store that keeps all."""
    return trained_from_a_store(folder, "language", Workspace(folder / "kept"))


def trained_from_a_store(folder: Path, kind: str, workspace: Workspace) -> dict[str, bytes]:
    plan = streamed_plan(folder, kind, "keep")
    extract(plan, workspace)
    train(plan, workspace)
    return weights(plan, workspace)


@pytest.fixture
def streamed(folder: Path, tmp_path: Path) -> Streamed:
    """The study of a language model, whose stream has its store."""
    plan, workspace = streamed_plan(folder, "language", "stream"), Workspace(tmp_path / "workspace")
    extract(plan, workspace)
    return plan, workspace


def windows_from(plan: Plan, workspace: Workspace, step: int) -> list[set[int]]:
    """The shards of each window that is read from a step on, without those that the store keeps."""
    store, recipe = ActivationStore(workspace.storage(plan.store)), plan.experiment.train
    training, _ = split_shards(store, recipe.heldout_shards)
    order = Order(
        chunks={shard: store.chunks([shard]) for shard in training},
        buffer_chunks=recipe.buffer_chunks,
        seed=recipe.data_seed,
        window_shards=recipe.window_shards,
    )
    read = order.shards(step * recipe.batch_size, recipe.steps * recipe.batch_size)
    return [set(shards) - KEPT for _, shards in read]


def test_a_language_model_gives_the_weights_of_a_store_with_two_windows_on_disk(
    streamed: Streamed, expected: dict[str, bytes]
) -> None:
    plan, workspace = streamed
    ring, made, there = workspace.ring(plan.store), list[int](), list[int]()

    def note(shard: int) -> None:
        made.append(shard)
        there.append(len(ring.sizes(fmt.COMMITS)))

    assert len(train(plan, workspace, row_maker=noting(note)).made) == 2
    assert weights(plan, workspace) == expected
    assert set(made) == set(range(TRAINED)) - KEPT
    assert max(Counter(made).values()) <= PASSES
    assert max(there) < 2 * WINDOW
    assert not ring.root.exists()


def test_a_synthetic_model_does_too(folder: Path, tmp_path: Path) -> None:
    plan, workspace = streamed_plan(folder, "synthetic", "stream"), Workspace(tmp_path / "stream")
    extract(plan, workspace)
    train(plan, workspace, row_maker=row_maker)
    assert weights(plan, workspace) == trained_from_a_store(folder, "synthetic", Workspace(tmp_path / "keep"))


def test_processes_share_a_ring_and_make_each_shard_once(
    streamed: Streamed, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    plan, workspace = streamed
    made = list[int]()

    def note(shard: int) -> None:
        together(plan, workspace) if not made else None
        made.append(shard)

    others = tmp_path / "made"
    other = forked(train_here, plan.experiment.argument, str(workspace.root), "baseline", str(others), "together", 1)
    train(replace(plan, saes=plan.saes[1:]), workspace, row_maker=noting(note))
    other.join(60)
    assert other.exitcode == 0
    again = [shard for last, shards in pairwise([set[int](), *windows_from(plan, workspace, 0)]) for shard in shards - last]
    assert Counter(made + noted(others)) == Counter(again)
    assert weights(plan, workspace) == expected
    assert not workspace.ring(plan.store).root.exists()


def test_a_killed_reader_does_not_block_another(streamed: Streamed, tmp_path: Path, expected: dict[str, bytes]) -> None:
    plan, workspace = streamed
    full = replace(plan, saes=plan.saes[1:])
    made = tmp_path / "made"
    other = forked(train_here, plan.experiment.argument, str(workspace.root), "baseline", str(made), "hang", 1)
    while not noted(made):  # it has claimed a shard that the first window needs
        assert other.is_alive()
        time.sleep(0.01)
    train(full, workspace, row_maker=noting(lambda _: other.kill()))
    other.join(60)
    assert weights(full, workspace) == {str(sae): expected[str(sae)] for sae in full.saes}
    assert not workspace.ring(plan.store).root.exists()


def test_a_run_that_is_killed_goes_on_and_makes_only_what_it_still_needs(
    streamed: Streamed, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    plan, workspace = streamed
    killed = forked(train_here, plan.experiment.argument, str(workspace.root), None, str(tmp_path / "made"), "kill", 12)
    killed.join(60)
    assert killed.exitcode == -signal.SIGKILL
    assert workspace.ring(plan.store).root.exists()
    reached = max(checkpoint.steps(workspace.folder(plan.saes[0].artefact)))
    assert reached >= PASS
    made = list[int]()
    train(plan, workspace, row_maker=noting(made.append))
    assert set(made) <= set[int]().union(*windows_from(plan, workspace, reached))
    assert weights(plan, workspace) == expected
    assert not workspace.ring(plan.store).root.exists()


def test_a_request_to_stop_is_heeded_while_no_batch_comes(
    streamed: Streamed, tmp_path: Path, expected: dict[str, bytes]
) -> None:
    plan, workspace = streamed
    made = tmp_path / "made"
    stopped = forked(train_here, plan.experiment.argument, str(workspace.root), None, str(made), "term", 1)
    stopped.join(60)
    assert stopped.exitcode == 128 + signal.SIGTERM
    assert len(noted(made)) == 1, "the window was made all the same"
    assert not workspace.ring(plan.store).root.exists()
    train(plan, workspace, row_maker=row_maker)
    assert weights(plan, workspace) == expected


def test_a_stream_without_a_maker_of_its_rows_is_refused(streamed: Streamed) -> None:
    with pytest.raises(BadInputError, match="give train\\(\\) a row_maker"):
        train(*streamed)
