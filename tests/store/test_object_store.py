"""A workspace on an object store, which is a moto server on the loopback interface."""

import shutil
import threading
import time
import urllib.request
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from object_store import SECRET, account, serving
from small_store import SHARD_ROWS, new_store, numbered, numbers, shard_rows
from small_study import SMALL, Study
from streamed_study import noting, streamed_plan
from typer.testing import CliRunner

from pipeline.artefacts.manifest import MANIFEST
from pipeline.artefacts.storage import LocalStorage, ObjectStorage, open_storage
from pipeline.artefacts.workspace import Workspace
from pipeline.cli import app
from pipeline.errors import BadInputError, CorruptArtefactError, PipelineError, StorageError
from pipeline.extract.extraction import extract
from pipeline.store import format as fmt
from pipeline.store.batches import shuffled_batches
from pipeline.store.reader import ActivationStore
from pipeline.store.writer import ShardWriter, commit_name
from pipeline.study.experiment import Experiment
from pipeline.study.plan import make_plan
from pipeline.train.training import train


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """URL of a server with an empty bucket called `bucket`."""
    with serving() as url:
        yield url


@pytest.fixture(autouse=True)
def _account(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in account(server, tmp_path / "cache").items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> str:
    """A prefix of its own for every test."""
    return f"s3://bucket/{request.node.name}/study"


def objects(place: str) -> dict[str, bytes]:
    storage = open_storage(place)
    return {name: storage.read(name) for name in storage.sizes() if not name.endswith(MANIFEST)}


def copied(study: Study, place: str, *kinds: str) -> Workspace:
    """A workspace there with the study's artefacts of some kinds."""
    storage = open_storage(place)
    for kind in kinds:
        for path in (study.workspace.local / kind).rglob("*"):
            if path.is_file():
                storage.write(path.relative_to(study.workspace.local).as_posix(), path.read_bytes())
    return Workspace(place)


def filled(storage: Any, values_RD: torch.Tensor) -> ActivationStore:
    fmt.create(storage, new_store(len(values_RD), chunk_rows=SHARD_ROWS))
    writer = ShardWriter(storage)
    for shard in writer.missing():
        start, stop = writer.layout.shard_range(shard)
        writer.write(shard, shard_rows(values_RD[start:stop], start))
    return ActivationStore(storage)


def test_the_same_objects_as_files(study: Study, place: str) -> None:
    from pipeline.extract.extraction import extract

    workspace = copied(study, place, "models")
    assert extract(study.plan, workspace) == [study.plan.store, *study.plan.probes.values()]
    local = {
        path.relative_to(study.workspace.local).as_posix(): path.read_bytes()
        for kind in ("models", "stores", "probes")
        for path in (study.workspace.local / kind).rglob("*")
        if path.is_file() and path.name != MANIFEST
    }
    assert objects(place) == local
    assert extract(study.plan, workspace) == []
    here, there = (
        ActivationStore(study.workspace.storage(study.plan.store)),
        ActivationStore(f"{place}/{study.plan.store.path}"),
    )
    assert torch.equal(here.read(2, 4000, 9000), there.read(2, 4000, 9000))

    # One damaged object is named, and made again alone.
    storage, file = workspace.storage(study.plan.store), "layer_02/c/2/0"
    content = bytearray(storage.read(file))
    content[1000] ^= 8
    storage.write(file, bytes(content))
    with pytest.raises(CorruptArtefactError, match=f"{file}: chunk 0 does not match its checksum"):
        there.read(2, 8192, 9000)
    shown = CliRunner().invoke(app, ["store", "verify", f"{place}/{study.plan.store.path}", "--deep"])
    assert (shown.exit_code, f"damaged: {file} does not match its checksum" in shown.output) == (1, True)
    storage.delete("layer_02/c/3/0")
    with pytest.raises(CorruptArtefactError, match="layer_02/c/3/0 is missing"):
        ActivationStore(storage)
    assert extract(study.plan, workspace, deep=True) == [study.plan.store]
    assert objects(place) == local


def test_the_whole_study_runs_there(study: Study, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied(study, place, "models", "stores", "probes")
    toml = tmp_path / "small.toml"
    toml.write_text(SMALL)
    result = CliRunner().invoke(app, ["ablate", str(toml), "--workspace", place])
    assert result.exit_code == 0, result.output
    plan = make_plan(Experiment.load(str(toml)))
    workspace = Workspace(place)
    for sae in plan.saes:
        assert workspace.manifest(sae.artefact)
        assert workspace.manifest(sae.evaluation)
        weights = f"{sae.artefact.path}/sae_weights.safetensors"
        assert open_storage(place).read(weights) == (study.workspace.local / weights).read_bytes()
    assert b"<html" in open_storage(place).read("reports/small/index.html")
    assert f"report: {place}/reports/small/index.html" in result.output
    # Another machine has nothing but the object store.
    shutil.rmtree(tmp_path / "cache")
    exported = CliRunner().invoke(app, ["export", "full-s0", str(tmp_path / "exported"), "--workspace", place])
    assert exported.exit_code == 0, exported.output
    assert (tmp_path / "exported" / "sae_weights.safetensors").is_file()
    again = CliRunner().invoke(app, ["ablate", str(toml), "--workspace", place])
    assert again.exit_code == 0, again.output
    assert "train: 0 SAEs trained" in again.output
    assert "evaluate: 0 SAEs evaluated" in again.output
    status = CliRunner().invoke(app, ["status", str(toml), "--workspace", place])
    assert f"all done; report: {place}/reports/small/index.html" in status.output


def test_a_stream_of_a_store_there_is_on_this_machine(place: str, tmp_path: Path) -> None:
    plan, workspace = streamed_plan(tmp_path, "synthetic", "stream"), Workspace(place)
    extract(plan, workspace)
    kept = ActivationStore(workspace.storage(plan.store))
    assert len(kept.shards) < len(kept.every_shard)
    there = workspace.storage(plan.store).sizes()
    ring = workspace.ring(plan.store)
    made: list[int] = []
    train(plan, workspace, row_maker=noting(lambda _: made.append(len(ring.sizes("readers")))))
    assert set(made) == {1}
    assert all(workspace.manifest(sae.artefact) for sae in plan.saes)
    assert workspace.storage(plan.store).sizes() == there
    assert not ring.root.exists()


def test_of_two_writers_the_first_commits(place: str) -> None:
    storage = open_storage(place)
    assert [storage.create("record", content) for content in (b"first", b"second")] == [True, False]
    assert storage.read("record") == b"first"
    # Many at once: exactly one.
    won: list[bytes] = []
    writers = [
        threading.Thread(target=lambda mark=mark: won.append(mark) if storage.create("race", mark) else None)
        for mark in (b"1", b"2", b"3", b"4", b"5", b"6")
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert won == [storage.read("race")]

    values_RD = numbered(SHARD_ROWS)
    fmt.create(storage, new_store(SHARD_ROWS))
    commit = ShardWriter(storage).write(0, shard_rows(values_RD))
    assert ShardWriter(storage).write(0, shard_rows(values_RD)) == commit
    with pytest.raises(CorruptArtefactError, match="written by two machines"):
        ShardWriter(storage).write(0, shard_rows(values_RD + 1))
    assert storage.size(commit_name(0)) is None  # it would vouch for the other one's files


class Watched(ObjectStorage):
    """Counts the reads under way."""

    now = most = 0
    lock = threading.Lock()
    lengths: list[int] = []  # noqa: RUF012

    def read_into(self, name: str, offset: int, buffers: list[np.ndarray]) -> None:
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.lengths.append(sum(buffer.nbytes for buffer in buffers))
        time.sleep(0.05)  # as a real object store would take
        super().read_into(name, offset, buffers)
        with self.lock:
            self.now -= 1


def test_batches_read_whole_shards_a_dozen_at_once(place: str) -> None:
    storage = Watched(place)
    store = filled(storage, numbered(24 * SHARD_ROWS))
    batches = list(islice(shuffled_batches(store, 3, store.shards, batch_size=64, buffer_chunks=24, seed=0), 24))
    assert sorted(numbers(torch.cat(batches), store.scale(3))) == list(range(24 * SHARD_ROWS))
    assert 2 < storage.most <= 12
    whole = SHARD_ROWS * 8 * 2 + 4
    assert {length for length in storage.lengths if length > 100} == {whole}


def test_what_an_object_store_objects_to_is_one_line(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(url: str) -> str:
        with pytest.raises(PipelineError) as refused:
            Workspace(url)
        message = str(refused.value)
        assert "\n" not in message
        assert SECRET not in message
        assert "somebody" not in message
        assert message.startswith(f"{url}: ")
        assert "check the URL, AWS_ENDPOINT_URL, AWS_REGION" in message
        return message

    assert "NoSuchBucket" in refusal("s3://another/study")
    storage = open_storage("s3://another/study")
    for ask in (lambda: storage.read("x"), lambda: storage.write("x", b""), lambda: storage.create("x", b"")):
        with pytest.raises(PipelineError, match="NoSuchBucket"):
            ask()
    with pytest.raises(FileNotFoundError):
        open_storage(place).read("x")
    with pytest.raises(BadInputError, match="names no bucket; give s3://bucket"):
        Workspace("s3://")
    monkeypatch.setattr("pipeline.artefacts.object_storage.RETRIES", {"max_retries": 1})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert "the object store cannot be reached" in refusal("s3://bucket/study")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "Missing SecretAccessKey" in refusal("s3://bucket/study")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", "http://127.0.0.1:9")
    assert "there are no credentials" in refusal("s3://bucket/study")


def test_a_server_without_conditional_writes_is_refused_on_opening(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore
    from obstore.exceptions import GenericError

    put = obstore.put
    Workspace(place)
    assert open_storage(place).sizes() == {}

    def ignoring(store: Any, name: str, content: Any, **_: Any) -> Any:
        return put(store, name, content)

    def refusing(*_: Any, **__: Any) -> Any:
        raise GenericError("Generic S3 error: 501 Not Implemented: <Code>NotImplemented</Code>")

    for other in (ignoring, refusing):
        monkeypatch.setattr(obstore, "put", other)
        with pytest.raises(PipelineError, match="does not support conditional writes") as refused:
            Workspace(place)
        assert "AWS_SECRET_ACCESS_KEY" not in str(refused.value)
    assert open_storage(place).sizes() == {}


def test_a_conflict_is_tried_again(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import obstore
    from obstore.exceptions import AlreadyExistsError

    put, answers = obstore.put, ["409", "409"]

    def conflicting(*arguments: Any, **options: Any) -> Any:
        if answers:
            raise AlreadyExistsError(answers.pop())
        return put(*arguments, **options)

    monkeypatch.setattr("pipeline.artefacts.object_storage.CONFLICT_PAUSES", (0, 0, 0))
    monkeypatch.setattr(obstore, "put", conflicting)
    storage = open_storage(place)
    assert storage.create("record", b"1")
    answers[:] = ["409"]
    storage.write("record", b"2")
    assert storage.read("record") == b"2"
    answers[:] = ["409"] * 3
    with pytest.raises(StorageError, match="409 Conflict"):
        storage.write("record", b"3")


def test_plain_http_is_explained(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ALLOW_HTTP")
    with pytest.raises(PipelineError, match="set AWS_ALLOW_HTTP=true"):
        Workspace(place)


def test_the_page_of_a_report_opens_in_a_browser_by_a_link_that_holds_no_secret(place: str) -> None:
    report = Workspace(place).report("small")
    report.write("index.html", b"<h1>a page</h1>")
    link = report.link("index.html")
    assert SECRET not in link
    with urllib.request.urlopen(link, timeout=30) as answer:
        assert answer.headers["Content-Type"] == "text/html"
        assert answer.read() == b"<h1>a page</h1>"


def test_an_object_is_shared_by_a_copy_that_the_server_makes(place: str) -> None:
    one, other = open_storage(f"{place}/stores/one"), open_storage(f"{place}/stores/other")
    one.write("layer_03/c/0/0", b"rows")
    other.write("layer_03/c/0/0", b"of a killed attempt")
    assert other.share("layer_03/c/0/0", one, "layer_03/c/0/0")
    assert other.read("layer_03/c/0/0") == b"rows"
    assert not other.share("x", LocalStorage(Path("/")), "x")
    assert sorted(open_storage(place).folders("stores")) == ["one", "other"]
