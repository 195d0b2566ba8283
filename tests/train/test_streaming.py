"""Training from a stream: the weights of a store, a bounded ring on disk, shared by processes, and safe to kill."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from grown_study import Grown
from streamed_study import BATCH, SHARD, STEPS, TRAINED, WINDOW, streamed_plan, weights

from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError
from pipeline.extract.extraction import extract, row_maker
from pipeline.store import format as fmt
from pipeline.store.batches import split_shards
from pipeline.store.order import Order
from pipeline.store.reader import ActivationStore
from pipeline.store.ring import Maker
from pipeline.study.plan import Plan
from pipeline.train import checkpoint
from pipeline.train.training import train

KEPT = {0, 1}
PASS = TRAINED * SHARD // BATCH
"""Steps of a pass."""
PASSES = -(-STEPS // PASS)
TRAINER = """
import json, os, signal, sys, time
from pathlib import Path
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import PipelineError
from pipeline.extract.extraction import row_maker
from pipeline.study.experiment import Experiment
from pipeline.study.plan import make_plan
from pipeline.train import cohort
from pipeline.train.training import train

cohort.SAVING_SHARE = float("inf")  # a checkpoint every step
toml, root, arm, made, what = sys.argv[1:]
plan, workspace = make_plan(Experiment.load(toml), arms=[arm] if arm else None), Workspace(root)
readers = workspace.ring(plan.store).root / "readers"

def open_rows(plan, workspace):
    make = row_maker(plan, workspace)

    def noted(shard):
        with open(made, "a") as file:
            file.write(f"{shard}\\n")
        done = len(Path(made).read_text().split())
        if what == "together" and done == 1:
            while len(list(readers.glob("*.json"))) < 2:
                time.sleep(0.01)
        if what == "hang":
            time.sleep(600)
        if what.startswith("kill") and done == int(what[4:]):
            os.kill(os.getpid(), signal.SIGKILL)
        if what.startswith("term") and done == int(what[4:]):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(2)
        return make(shard)

    return noted

try:
    train(plan, workspace, row_maker=open_rows, save_every=0)
except PipelineError as error:
    sys.exit(f"{error}\\n{error.exit_code}")
"""
"""Trains an arm, and notes each shard that it makes. It waits for a second reader, hangs, or sends itself a signal."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("streamed")
    Grown.made(made)
    return made


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, bytes]:
    """The weights of the synthetic study, trained from a store that keeps all."""
    plan, workspace = streamed_plan(folder, "synthetic", "keep"), Workspace(folder / "kept")
    extract(plan, workspace)
    train(plan, workspace)
    return weights(plan, workspace)


@pytest.fixture
def streamed(folder: Path, tmp_path: Path) -> tuple[Plan, Workspace]:
    """The synthetic study, whose stream has its store."""
    plan, workspace = streamed_plan(folder, "synthetic", "stream"), Workspace(tmp_path / "workspace")
    extract(plan, workspace)
    return plan, workspace


@contextmanager
def trainer(plan: Plan, workspace: Workspace, made: Path, what: str, arm: str = "") -> Generator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", TRAINER, plan.experiment.argument, str(workspace.root), arm, str(made), what]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ) as process:
        try:
            yield process
        finally:
            process.kill()


def noted(made: Path) -> list[int]:
    return [int(line) for line in made.read_text().split()] if made.exists() else []


def noting(
    made: list[int], before: Callable[[], None] = lambda: None
) -> Callable[[Plan, Workspace], Callable[[int], fmt.ShardRows]]:
    def opened(plan: Plan, workspace: Workspace) -> Maker:
        make = row_maker(plan, workspace)

        def note(shard: int) -> fmt.ShardRows:
            before()
            made.append(shard)
            return make(shard)

        return note

    return opened


def read_from(plan: Plan, workspace: Workspace, step: int) -> list[list[int]]:
    """The shards of each window that is read from a step on."""
    store = ActivationStore(workspace.storage(plan.store))
    recipe = plan.experiment.train
    training, _ = split_shards(store, recipe.heldout_shards)
    order = Order(
        chunks={shard: store.chunks([shard]) for shard in training},
        buffer_chunks=recipe.buffer_chunks,
        seed=recipe.data_seed,
        window_shards=recipe.window_shards,
    )
    read = order.shards(step * recipe.batch_size, recipe.steps * recipe.batch_size)
    return [shards for _, shards in read]


def test_a_language_model_gives_the_weights_of_a_store(folder: Path, tmp_path: Path) -> None:
    found: list[dict[str, bytes]] = []
    for mode in ("keep", "stream"):
        plan, workspace = replace(streamed_plan(folder, "language", mode), probes={}), Workspace(tmp_path / mode)
        extract(plan, workspace)
        train(plan, workspace, row_maker=row_maker)
        found.append(weights(plan, workspace))
    assert found[0] == found[1]
    assert len(found[0]) == 2


def test_a_synthetic_model_does_too_makes_each_shard_once_a_pass_and_keeps_two_windows(
    streamed: tuple[Plan, Workspace], expected: dict[str, bytes]
) -> None:
    plan, workspace = streamed
    made, there = list[int](), list[int]()
    train(plan, workspace, row_maker=noting(made, lambda: there.append(len(workspace.ring(plan.store).sizes(fmt.COMMITS)))))
    assert weights(plan, workspace) == expected
    assert set(made) == set(range(TRAINED)) - KEPT
    assert max(Counter(made).values()) <= PASSES
    assert max(there) < 2 * WINDOW
    assert not workspace.ring(plan.store).root.exists()


def test_processes_share_a_ring_and_make_each_shard_once(
    streamed: tuple[Plan, Workspace], tmp_path: Path, expected: dict[str, bytes]
) -> None:
    plan, workspace = streamed
    readers, made = workspace.ring(plan.store), list[int]()
    full = replace(plan, saes=plan.saes[1:])
    with trainer(plan, workspace, tmp_path / "made", "together", "baseline") as other:

        def wait_for_other() -> None:
            while not made and len(readers.sizes("readers")) < 2:
                assert other.poll() is None
                time.sleep(0.01)

        train(full, workspace, row_maker=noting(made, wait_for_other))
        _, said = other.communicate(timeout=120)
        assert other.returncode == 0, said
    windows = [set(shards) for shards in read_from(plan, workspace, 0)]
    again = [shard for last, shards in pairwise([set(), *windows]) for shard in shards - last - KEPT]
    assert Counter(made + noted(tmp_path / "made")) == Counter(again)
    assert weights(plan, workspace) == expected
    assert not readers.root.exists()


def test_a_killed_reader_does_not_block_another(
    streamed: tuple[Plan, Workspace], tmp_path: Path, expected: dict[str, bytes]
) -> None:
    plan, workspace = streamed
    full = replace(plan, saes=plan.saes[1:])
    with trainer(plan, workspace, tmp_path / "made", "hang", "baseline") as other:
        while not noted(tmp_path / "made"):  # it has claimed a shard that the first window needs
            assert other.poll() is None
            time.sleep(0.01)
        train(full, workspace, row_maker=noting([], other.kill))
    assert weights(full, workspace) == {str(sae): expected[str(sae)] for sae in full.saes}
    assert not workspace.ring(plan.store).root.exists()


def test_a_run_that_is_killed_goes_on_and_makes_only_what_it_still_needs(
    streamed: tuple[Plan, Workspace], tmp_path: Path, expected: dict[str, bytes]
) -> None:
    plan, workspace = streamed
    with trainer(plan, workspace, tmp_path / "made", "kill16") as process:
        process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert workspace.ring(plan.store).root.exists()
    reached = max(checkpoint.steps(workspace.folder(plan.saes[0].artefact)))
    assert reached > PASS
    made: list[int] = []
    train(plan, workspace, row_maker=noting(made))
    assert set(made) <= {shard for shards in read_from(plan, workspace, reached) for shard in shards}
    assert weights(plan, workspace) == expected
    assert not workspace.ring(plan.store).root.exists()


def test_a_request_to_stop_is_heeded_while_no_batch_comes(
    streamed: tuple[Plan, Workspace], tmp_path: Path, expected: dict[str, bytes]
) -> None:
    plan, workspace = streamed
    with trainer(plan, workspace, tmp_path / "made", "term9") as process:
        _, said = process.communicate(timeout=120)
    assert said.endswith(f"\n{128 + signal.SIGTERM}\n")
    assert "stopped on request after step" in said
    assert len(noted(tmp_path / "made")) == 9, "the window was made all the same"
    assert not workspace.ring(plan.store).root.exists()
    train(plan, workspace, row_maker=row_maker)
    assert weights(plan, workspace) == expected


def test_a_stream_without_a_maker_of_its_rows_is_refused(streamed: tuple[Plan, Workspace]) -> None:
    with pytest.raises(BadInputError, match="give train\\(\\) a row_maker"):
        train(*streamed)
