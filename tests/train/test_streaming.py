"""Training from a stream: the weights of a store, a bounded ring on disk, shared by processes, and safe to kill."""

from pathlib import Path

import pytest
from grown_study import Grown
from streamed_study import streamed_plan, weights

from pipeline.artefacts.workspace import Workspace
from pipeline.extract.extraction import extract, row_maker
from pipeline.store.reader import ActivationStore
from pipeline.train.training import train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("streamed")
    Grown.made(made)
    return made


@pytest.mark.parametrize("kind", ["language", "synthetic"])
def test_a_stream_gives_the_weights_of_a_store(folder: Path, tmp_path: Path, kind: str) -> None:
    found = []
    for mode in ("keep", "stream"):
        plan, workspace = streamed_plan(folder, kind, mode), Workspace(tmp_path / mode)
        extract(plan, workspace)
        assert len(train(plan, workspace, row_maker=row_maker).made) == 2
        found.append(weights(plan, workspace))
        print(mode, ActivationStore(workspace.storage(plan.store)).shards)
    assert found[0] == found[1]
