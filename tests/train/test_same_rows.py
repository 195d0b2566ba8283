"""With another layer in the store, SAEs that were trained on the same rows are taken over; with other rows they are not."""

from pathlib import Path

import pytest
from grown_study import Grown

from pipeline.artefacts.workspace import Workspace
from pipeline.extract.extraction import extract
from pipeline.sae.formats import WEIGHTS
from pipeline.study.plan import Plan
from pipeline.train.run import Runner
from pipeline.train.training import train


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Grown:
    return Grown.made(tmp_path_factory.mktemp("grown"))


def weights(plan: Plan, workspace: Workspace) -> bytes:
    (sae,) = plan.saes
    assert workspace.manifest(sae.artefact)
    return (workspace.folder(sae.artefact) / WEIGHTS).read_bytes()


def test_another_layer_trains_no_sae_again(
    grown: Grown, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace, small, large = Workspace(tmp_path / "ws"), grown.plan(1100, (1,)), grown.plan(1100, (1, 3))
    extract(small, workspace)
    train(small, workspace)
    extract(large, workspace)
    assert small.saes[0].artefact.key != large.saes[0].artefact.key
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "run", lambda *_: pytest.fail("trained again"))
        assert train(large, workspace).made == list(large.saes)
        assert "taken over from a store with other layers" in capsys.readouterr().err
        assert train(large, workspace).made == []
    assert weights(small, workspace) == weights(large, workspace)
    workspace.discard(small.saes[0].artefact)  # neither depends on the other
    fresh = Workspace(tmp_path / "fresh")
    extract(large, fresh)
    train(large, fresh)
    assert weights(large, workspace) == weights(large, fresh)


def test_more_tokens_are_other_rows(grown: Grown, tmp_path: Path) -> None:
    workspace, small, large = Workspace(tmp_path / "ws"), grown.plan(1100, (1,)), grown.plan(1500, (1,))
    for plan in (small, large):
        extract(plan, workspace)
        assert train(plan, workspace).made == list(plan.saes)
    assert weights(small, workspace) != weights(large, workspace)
