"""The flows on a Dask scheduler and two workers of its own, all on the loopback interface."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from faulty import files_of
from prefect.client.orchestration import get_client
from small_study import SMALL, Study

import flows
from pipeline.artefacts.storage import open_storage
from pipeline.study.experiment import Experiment
from pipeline.study.plan import make_plan

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("temporary_server")]

ROOT = Path(__file__).parents[2]
DASK = [sys.executable, "-m", "dask"]
S3 = {
    "AWS_ACCESS_KEY_ID": "somebody",
    "AWS_SECRET_ACCESS_KEY": "a-secret",
    "AWS_REGION": "us-east-1",
    "AWS_ALLOW_HTTP": "true",
}


@dataclass
class Cluster:
    """A scheduler and its workers, each a process of its own that can be killed."""

    folder: Path
    environment: dict[str, str]
    address: str = ""
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, stack: ExitStack, *arguments: str) -> subprocess.Popen[bytes]:
        log = stack.enter_context((self.folder / f"{arguments[0]}-{len(self.workers)}.log").open("wb"))
        started = subprocess.Popen([*DASK, *arguments], cwd=ROOT, env=self.environment, stdout=log, stderr=log)
        process = stack.enter_context(started)
        stack.callback(process.kill)
        return process

    def add_worker(self, stack: ExitStack) -> None:
        folder = str(self.folder / f"worker-{len(self.workers)}")
        options = ("--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", folder)
        self.workers.append(self.start(stack, "worker", self.address, *options))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Two workers that also know where the S3 server is."""
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    url = "http://{}:{}".format(*moto.get_host_and_port())
    urllib.request.urlopen(urllib.request.Request(f"{url}/bucket", method="PUT")).close()
    account = S3 | {"AWS_ENDPOINT_URL": url, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        stack.callback(moto.stop)
        for name, value in account.items():
            patch.setenv(name, value)
        found = Cluster(tmp_path, {**os.environ, "PYTHONPATH": str(ROOT)})
        at = tmp_path / "scheduler.json"
        options = ("--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(at))
        found.start(stack, "scheduler", *options)
        deadline = time.monotonic() + 60
        while not at.is_file() or not at.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        found.address = json.loads(at.read_text())["address"]
        for _ in range(2):
            found.add_worker(stack)
        yield found


def with_run(toml: Path, *changes: tuple[str, str], **run: str) -> Path:
    text = SMALL
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    toml.write_text(text + "\n[run]\n" + "".join(f'{name} = "{value}"\n' for name, value in run.items()))
    return toml


def weights(workspace: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in workspace.glob("saes/*/sae_weights.safetensors")}


def test_two_workers_make_the_bytes_that_one_process_makes(study: Study, cluster: Cluster, tmp_path: Path) -> None:
    toml, workspace = with_run(tmp_path / "small.toml", engine="dask", address=cluster.address), tmp_path / "workspace"
    assert flows.ablation(str(toml), str(workspace), return_state=True).name == "Completed"
    local = Path(study.workspace.root)
    for kind in ("models", "stores", "probes"):
        assert files_of(workspace / kind) == files_of(local / kind)
    assert weights(workspace) == weights(local)
    assert len(list(workspace.glob("evaluations/*/sparse_probing.json"))) == 3
    assert (workspace / "reports" / "small" / "index.html").is_file()
    assert flows.ablation(str(toml), str(workspace), return_state=True).name == "Cached"


def test_the_same_on_an_object_store(study: Study, cluster: Cluster, tmp_path: Path) -> None:
    toml = with_run(tmp_path / "small.toml", engine="dask", address=cluster.address)
    assert flows.ablation(str(toml), "s3://bucket/study", return_state=True).name == "Completed"
    local = Path(study.workspace.root)
    for kind, names in (("stores", "*"), ("saes", "*/sae_weights.safetensors")):
        expected = {name: data for name, data in files_of(local / kind).items() if names == "*" or name.endswith(names[2:])}
        there = open_storage(f"s3://bucket/study/{kind}")
        assert {name: there.read(name) for name in expected} == expected
    assert open_storage("s3://bucket/study/reports/small").size("index.html")
    again = flows.ablation(str(toml), "s3://bucket/study", return_state=True)
    assert again.name == "Cached"
    with get_client(sync_client=True) as client:
        links = client.request("POST", "/artifacts/filter", json={"artifacts": {"key": {"any_": ["small-report"]}}}).json()
        # Presigned links work for some days only: the run that found nothing to do made one, too.
        assert len({link["flow_run_id"] for link in links if "X-Amz-Signature" in link["data"]}) == 2
        logs = client.request("POST", "/logs/filter", json={}).text
        artifacts = client.request("POST", "/artifacts/filter", json={}).text
    assert "extract" in logs
    assert S3["AWS_SECRET_ACCESS_KEY"] not in logs + artifacts


def test_a_killed_worker_costs_only_its_unfinished_shards(study: Study, cluster: Cluster, tmp_path: Path) -> None:
    many = (
        ("tokens = 20_000", "tokens = 40_960"),
        ("shard_rows = 4096\nchunk_rows = 256", "shard_rows = 512\nchunk_rows = 128"),
    )
    toml = with_run(tmp_path / "small.toml", *many, engine="dask", address=cluster.address)
    plan = make_plan(Experiment.load(str(toml)))
    assert plan.model is not None
    places = {name: tmp_path / name for name in ("here", "there")}
    for place in places.values():
        shutil.copytree(study.workspace.folder(plan.model), place / plan.model.path)
    commits = places["there"] / plan.store.path / "commits"
    committed: dict[str, int] = {}

    def kill_one_of_two() -> None:
        while len(found := list(commits.glob("*.json"))) < 4:
            time.sleep(0.002)
        cluster.workers[0].send_signal(signal.SIGKILL)
        committed.update({path.name: path.stat().st_mtime_ns for path in found})

    killer = threading.Thread(target=kill_one_of_two, daemon=True)
    killer.start()
    assert flows.extract(str(toml), str(places["there"]), return_state=True).name == "Completed"
    killer.join(1)
    assert cluster.workers[0].poll() == -signal.SIGKILL
    assert 4 <= len(committed) < 79, "killed in the middle"
    assert {name: (commits / name).stat().st_mtime_ns for name in committed} == committed
    local = tmp_path / "local"
    local.mkdir()
    flows.extract(str(with_run(local / "small.toml", *many, engine="local")), str(places["here"]))
    for kind in ("stores", "probes"):
        assert files_of(places["there"] / kind) == files_of(places["here"] / kind)


def test_a_cluster_is_started_here_when_no_scheduler_is_named(study: Study, tmp_path: Path) -> None:
    toml = with_run(tmp_path / "small.toml", engine="dask")
    workspace = Path(shutil.copytree(study.workspace.root, tmp_path / "workspace"))
    shutil.rmtree(workspace / "saes")
    state = flows.train(str(toml), str(workspace), return_state=True)
    assert state.name == "Completed"
    assert weights(workspace) == weights(Path(study.workspace.root))
