"""What a look at a workspace on an object store costs, and that it shows what is there."""

import logging
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from object_store import account, serving
from small_study import Study

from pipeline.artefacts.glance import CATALOGUE
from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.storage import open_storage
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import CorruptArtefactError
from pipeline.study.experiment import Experiment
from pipeline.study.plan import Plan, make_plan
from pipeline.study.status import Status


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving() as url:
        yield url


@pytest.fixture
def place(request: pytest.FixtureRequest, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A workspace of its own for every test."""
    for name, value in account(server, tmp_path / "cache").items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{request.node.name}"


@pytest.fixture
def looks(place: str, caplog: pytest.LogCaptureFixture) -> Callable[[Plan], tuple[Status, int]]:
    """Looks at the workspace as a machine that opens it, and counts the requests."""

    def look(plan: Plan) -> tuple[Status, int]:
        caplog.clear()
        with caplog.at_level(logging.INFO, "werkzeug"):
            status = Status(plan, Workspace(place, only_read=True))
            status.next_command()
        return status, sum(record.name == "werkzeug" for record in caplog.records)

    return look


def written(workspace: Workspace, artefacts: list[Artefact], files: int) -> None:
    """Artefacts with so many files each."""
    for artefact in artefacts:
        with workspace.lock(artefact) as folder:
            for number in range(files):
                (folder / f"{number}.json").write_text("{}")
            workspace.publish(artefact)


def copied(workspace: Workspace, place: str) -> None:
    storage = open_storage(place)
    names = [name for name in workspace.place("").sizes() if ".locks" not in name]
    with ThreadPoolExecutor(8) as pool:
        deque(pool.map(lambda name: storage.write(name, (workspace.local / name).read_bytes()), names), maxlen=0)


def test_the_state_of_a_workspace_is_told_by_a_few_requests(
    study: Study, place: str, looks: Callable[[Plan], tuple[Status, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.artefacts.glance.MANY", 1)
    copied(study.workspace, place)
    storage = open_storage(place)
    here = Status(study.plan, study.workspace)
    for round_ in range(2):
        there, requests = looks(study.plan)
        assert there.found == here.found
        assert requests <= (40 if round_ == 0 else 10)
    # What changes is seen, although the catalogue has it as it was.
    sae, other = study.plan.saes[0].artefact, study.plan.saes[1].artefact
    storage.delete(f"{sae.path}/manifest.json")
    assert looks(study.plan)[0].found[sae.path].word == "partial"
    storage.write(f"{other.path}/manifest.json", b"{}")
    with pytest.raises(CorruptArtefactError, match="cannot be read"):
        looks(study.plan)
    storage.delete(f"{other.path}/manifest.json")
    storage.write(CATALOGUE, b"no catalogue")
    assert looks(study.plan)[0].found[sae.path].word == "partial"


@pytest.mark.slow
def test_that_of_a_study_of_gemma_by_thirty(place: str, looks: Callable[[Plan], tuple[Status, int]], tmp_path: Path) -> None:
    plan, workspace = make_plan(Experiment.load("gemma-2-2b")), Workspace(tmp_path / "workspace")
    written(workspace, [plan.store], 611 * (3 + 4 + 1))  # files of every shard: layers, origins of rows, commit
    written(workspace, [*plan.probes.values()], 100)
    written(workspace, [*plan.trained, *plan.evaluated], 4)
    copied(workspace, place)
    looks(plan)
    status, requests = looks(plan)
    assert {state.word for state in status.found.values()} == {"done"}
    assert requests <= 30
