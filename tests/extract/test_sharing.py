"""Extraction cut for workers: who gets which shards, and what looking after them costs."""

import heapq
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_store import SHARD_ROWS, new_store, numbered, shard_rows

from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.storage import LocalStorage
from pipeline.artefacts.workspace import Workspace
from pipeline.extract.extraction import shares
from pipeline.extract.fill import filling
from pipeline.store import format as fmt
from pipeline.store.writer import ShardWriter


@given(st.integers(0, 300), st.integers(0, 40), st.integers(1, 70))
def test_every_shard_is_in_one_part_and_the_last_parts_are_small(rows: int, probes: int, workers: int) -> None:
    work = {path: list(range(shards)) for path, shards in (("stores/a", rows), ("probes/b", probes)) if shards}
    parts = shares(work, workers)
    assert {path: [shard for part in parts for shard in part.get(path, [])] for path in work} == work
    sizes = [sum(map(len, part.values())) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert all(size == 1 for size in sizes[-workers:])


def test_unequal_workers_end_together() -> None:
    shards, paces = 10_000, [1.0] * 7 + [1.7]
    parts = shares({"stores/a": list(range(shards))}, len(paces))
    free = [(0.0, number) for number in range(len(paces))]
    for part in parts:
        ended, number = heapq.heappop(free)
        heapq.heappush(free, (ended + len(part["stores/a"]) * paces[number], number))
    at_best = shards / sum(1 / pace for pace in paces)
    assert max(free)[0] < 1.001 * at_best
    assert len(parts) < 150


def test_a_part_looks_up_its_own_shards_once_and_lists_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(tmp_path)
    artefact = Artefact(kind="stores", label="shared", inputs={})
    values_RD = numbered(8 * SHARD_ROWS)
    fmt.create(workspace.storage(artefact), new_store(len(values_RD)))
    writer = ShardWriter(workspace.storage(artefact))
    asked: list[str] = []
    committed = ShardWriter.committed
    monkeypatch.setattr(ShardWriter, "committed", lambda self, shard: asked.append(f"{shard}") or committed(self, shard))
    requests: list[str] = []
    for name in ("write", "create", "size", "read"):
        real = getattr(LocalStorage, name)
        monkeypatch.setattr(LocalStorage, name, lambda *given, real=real, name=name: requests.append(name) or real(*given))
    monkeypatch.setattr(LocalStorage, "sizes", lambda *given: pytest.fail(f"listed {given[1:]}"))

    def rows_of(shard: int) -> torch.Tensor:
        return values_RD[shard * SHARD_ROWS : (shard + 1) * SHARD_ROWS]

    writer.write(3, shard_rows(rows_of(3), 3 * SHARD_ROWS))
    requests.clear()
    with filling(artefact, workspace, writer, [2, 3, 4]) as store:
        for shard in store.claimed():
            store.commit(shard, shard_rows(rows_of(shard), shard * SHARD_ROWS))
    assert asked == ["2", "3", "4"]
    # What a plan counts (`pipeline.study.spread`): the layer, four row fields, the commit, and whether there is one.
    assert Counter(requests) == {"create": 2 * (1 + len(fmt.ROW_FIELDS) + 1), "size": 3}
    assert [shard for shard in range(8) if committed(writer, shard)] == [2, 3, 4]
