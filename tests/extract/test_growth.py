"""A store that grows: more tokens or another layer cost what is new, and the bytes are those of a fresh store."""

import errno
import shutil
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty import files_of
from grown_study import Grown
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_store import flipped

from pipeline.artefacts.storage import LocalStorage
from pipeline.artefacts.workspace import Workspace
from pipeline.extract.extraction import extract
from pipeline.models.language import ResidualStream
from pipeline.store import format as fmt
from pipeline.store.batches import split_shards
from pipeline.store.reader import ActivationStore
from pipeline.store.verify import damages
from pipeline.study.litter import litter, remove
from pipeline.study.plan import Plan

SHARD, CONTEXT = 256, 16


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Grown:
    return Grown.made(tmp_path_factory.mktemp("grown"))


@pytest.fixture(autouse=True)
def _no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.extract.extraction.describe", lambda _plan: "")  # it measures the machine


@contextmanager
def counted() -> Generator[list[tuple[int, tuple[int, ...]]]]:
    """The sequences that models run over while this lasts, and the layers that each model had."""
    runs: list[tuple[int, tuple[int, ...]]] = []
    call = ResidualStream.__call__

    def counting(self: ResidualStream, tokens_SL: torch.Tensor) -> dict[int, torch.Tensor]:
        if tokens_SL.shape[1] == CONTEXT:  # not the check that the model is causal
            runs.append((len(tokens_SL), self.layers))
        return call(self, tokens_SL)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResidualStream, "__call__", counting)
        yield runs


def sequences_of(plan: Plan, workspace: Workspace, shards: range) -> int:
    """Sequences that have rows of these shards, counted once for each shard."""
    layout, text = fmt.read_layout(workspace.storage(plan.store)), fmt.read_sequences(workspace.storage(plan.store))
    ranges = [layout.shard_range(shard) for shard in shards]
    offsets = text.row_offsets
    return sum(int(((offsets[:-1] < stop) & (offsets[1:] > start)).sum()) for start, stop in ranges)


def test_more_tokens_run_the_model_on_the_new_ones_only(grown: Grown, tmp_path: Path) -> None:
    workspace, (small, large) = Workspace(tmp_path / "ws"), (grown.plan(tokens, (1, 2)) for tokens in (1100, 2100))
    extract(small, workspace)
    with counted() as runs:
        assert extract(large, workspace) == [large.store]
    # The last shard of the smaller store was not full.
    assert sum(count for count, _ in runs) == sequences_of(large, workspace, range(4, 9))
    fresh = Workspace(tmp_path / "fresh")
    extract(large, fresh)
    assert files_of(workspace.folder(large.store)) == files_of(fresh.folder(large.store))
    assert damages(workspace.storage(large.store), deep=True) == []
    for shard in range(9):
        there = (workspace.folder(large.store) / fmt.layer_file(1, shard)).stat().st_nlink
        assert there == (2 if shard < 4 else 1), "what both have takes no space twice"


def test_another_layer_runs_the_model_once_and_writes_one_layer(
    grown: Grown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, (small, large) = Workspace(tmp_path / "ws"), (grown.plan(1100, layers) for layers in ((0, 2), (0, 2, 3)))
    extract(small, workspace)
    written: list[str] = []
    create = LocalStorage.create
    monkeypatch.setattr(
        LocalStorage, "create", lambda self, name, content: (written.append(name), create(self, name, content))[1]
    )
    with counted() as runs:
        extract(large, workspace)
    assert sum(count for count, _ in runs) == sequences_of(large, workspace, range(5))
    assert {name.split("/")[0] for name in written if name.startswith("layer") and "/c/" in name} == {"layer_03"}
    fresh = Workspace(tmp_path / "fresh")
    extract(large, fresh)
    assert files_of(workspace.folder(large.store)) == files_of(fresh.folder(large.store))
    with counted() as runs:
        extract(grown.plan(1100, (3, 2)), workspace)
    assert runs == [], "another choice of layers that are there needs no model"


def test_what_depends_on_all_layers_is_made_again_and_what_does_not_is_not(grown: Grown, tmp_path: Path) -> None:
    workspace, limit = Workspace(tmp_path / "ws"), "max_norm = 1.05"
    extract(grown.plan(1100, (1, 2), limit), workspace)
    with counted() as runs:
        extract(grown.plan(1100, (1,), limit), workspace)
    assert runs, "another layer would have left out other rows"
    large = grown.plan(2100, (1, 2), limit)
    with counted() as runs:
        extract(large, workspace)
    assert sum(count for count, _ in runs) == sequences_of(large, workspace, range(4, 9))
    fresh = Workspace(tmp_path / "fresh")
    extract(large, fresh)
    assert files_of(workspace.folder(large.store)) == files_of(fresh.folder(large.store))
    assert ActivationStore(fresh.folder(large.store)).rows < 2100


@pytest.mark.parametrize("change", ["seed = 1", 'dtype = "float32"', 'codec = "blosc"', "max_norm = 9"])
def test_a_store_that_differs_in_anything_else_is_no_relative(grown: Grown, tmp_path: Path, change: str) -> None:
    workspace = Workspace(tmp_path / "ws")
    extract(grown.plan(800, (1,)), workspace)
    other = grown.plan(800, (1,), change)
    with counted() as runs:
        extract(other, workspace)
    assert sum(count for count, _ in runs) == sequences_of(other, workspace, range(4))


def test_other_tokens_are_not_taken_over(grown: Grown, tmp_path: Path) -> None:
    """A store of the same name that another version of a tokenizer made."""
    workspace, (small, large) = Workspace(tmp_path / "ws"), (grown.plan(tokens, (1,)) for tokens in (800, 1100))
    extract(small, workspace)
    fresh = Workspace(tmp_path / "fresh")
    extract(large, fresh)
    storage, text = fresh.storage(large.store), fmt.read_sequences(fresh.storage(large.store))
    text.tokens_SL[5, 3] += 1
    fmt.create(workspace.storage(large.store), fmt.NewStore(layout=fmt.read_layout(storage), sequences=text))
    with counted() as runs:
        extract(large, workspace)
    made = sequences_of(large, workspace, range(1)) + sequences_of(large, workspace, range(3, 5))
    assert sum(count for count, _ in runs) == made, "the first shard has other tokens, the others were not full or not there"


class Killed(BaseException):
    """The process is gone."""


@contextmanager
def killed_at(operation: int) -> Generator[None]:
    """While this lasts, the process dies before its so many-th change of a file."""
    left = operation

    def dying(change: Any, *arguments: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        return change(*arguments)

    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        for name in ("write", "create", "share", "delete"):
            patch.setattr(LocalStorage, name, partialmethod(dying, getattr(LocalStorage, name)))
        yield


def partialmethod(dying: Any, change: Any) -> Any:
    return lambda self, *arguments: dying(change, self, *arguments)


TOKENS, LAYERS = (800, 1100, 1500), ((1,), (1, 3), (3, 0))
steps = st.lists(
    st.tuples(
        st.sampled_from([(tokens, layers) for tokens in TOKENS for layers in LAYERS]),
        st.one_of(st.none(), st.integers(0, 60)),  # a kill
        st.one_of(st.none(), st.integers(0, 500)),  # a flipped bit, and a repair
    ),
    min_size=2,
    max_size=5,
)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps)
def test_any_sequence_of_growth_kills_and_repairs_gives_the_bytes_of_a_fresh_store(
    grown: Grown, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[Any, int | None, int | None]]
) -> None:
    workspace, fresh = Workspace(tmp_path_factory.mktemp("ws")), Workspace(grown.folder / "fresh")
    plans: dict[Any, Plan] = {}
    for size, kill, damage in steps:
        plan = plans.setdefault(size, grown.plan(*size))
        if not fresh.manifest(plan.store):
            extract(plan, Workspace(alone := grown.folder / f"alone-{size}"))
            shutil.copytree(Workspace(alone).folder(plan.store), fresh.folder(plan.store))
        if kill is not None:
            with killed_at(kill):
                extract(plan, workspace)
        if damage is not None:
            files = sorted((workspace.local / "stores").rglob("layer_*/c/*/0"))
            for path in files[damage % len(files) :][:1] if files else ():
                flipped(path)  # in every store that shares it
        extract(plan, workspace, deep=damage is not None)
    for size, plan in plans.items():
        extract(plan, workspace, deep=True)
        assert files_of(workspace.folder(plan.store)) == files_of(fresh.folder(plan.store)), size


def test_growth_moves_no_held_out_row_into_training(grown: Grown, tmp_path: Path) -> None:
    workspace, small = Workspace(tmp_path / "ws"), grown.plan(1100, (1,))
    extract(small, workspace)
    for tokens, layers in ((1500, (1,)), (2100, (1, 2))):
        plan = grown.plan(tokens, layers)
        recipe = plan.experiment.train.model_copy(update={"heldout_within": 1100})
        extract(plan, workspace)
        training, heldout = split_shards(ActivationStore(workspace.folder(plan.store)), 2, recipe.heldout_within)
        assert heldout == [3, 4]
        assert training == [0, 1, 2, *range(5, -(-tokens // SHARD))]
        held = rows_of(small, workspace, split_shards(ActivationStore(workspace.folder(small.store)), 2)[1])
        assert held <= rows_of(plan, workspace, heldout)
        assert not held & rows_of(plan, workspace, training)


def rows_of(plan: Plan, workspace: Workspace, shards: list[int]) -> set[tuple[int, int]]:
    store = ActivationStore(workspace.folder(plan.store))
    fields = [[store.read_field(name, *store.row_range(shard)) for name in ("sequence", "position")] for shard in shards]
    return {place for sequence, position in fields for place in zip(sequence.tolist(), position.tolist(), strict=True)}


def test_what_is_held_out_is_told_when_a_store_grows(
    grown: Grown, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = Workspace(tmp_path / "ws")
    extract(grown.plan(1100, (1,)), workspace)
    assert "heldout_within" not in capsys.readouterr().err
    extract(grown.plan(1500, (1,)), workspace)
    assert "train.heldout_within = 1100 holds out the same shards again" in capsys.readouterr().err


def test_without_hard_links_files_are_copied(grown: Grown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace, large = Workspace(tmp_path / "ws"), grown.plan(1100, (1,))
    extract(grown.plan(800, (1,)), workspace)

    def no_link(_source: object, _final: object) -> None:
        raise OSError(errno.EPERM, "this file system has none")

    monkeypatch.setattr("pipeline.artefacts.local_files.os.link", no_link)
    with counted() as runs:
        extract(large, workspace)
    assert sum(count for count, _ in runs) == sequences_of(large, workspace, range(3, 5))
    assert damages(workspace.storage(large.store), deep=True) == []


def test_what_a_removal_frees_is_what_no_other_store_shares(grown: Grown, tmp_path: Path) -> None:
    workspace, small, large = Workspace(tmp_path / "ws"), grown.plan(1100, (1,)), grown.plan(1500, (1,))
    extract(small, workspace)
    (alone,) = litter(workspace, [large])
    extract(large, workspace)
    (shared,) = litter(workspace, [large])
    layers = sum((workspace.folder(small.store) / fmt.layer_file(1, shard)).stat().st_size for shard in range(4))
    assert (shared.path, alone.bytes - shared.bytes) == (small.store.path, layers)
    assert list(remove(workspace, [shared])) == [shared]
    assert damages(workspace.storage(large.store), deep=True) == []
