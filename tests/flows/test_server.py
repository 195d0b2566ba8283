"""Everything that a user of a Prefect server types, against a real server and worker."""

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import pytest
from small_study import SMALL, Study

from pipeline.artefacts.workspace import Workspace
from pipeline.study.experiment import Experiment
from pipeline.study.plan import make_plan
from pipeline.train.training import train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PREFECT = str(Path(sys.executable).with_name("prefect"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a user whose Prefect home is empty."""
    foreign = {"PREFECT_API_URL", "PREFECT_PROFILE", "DASAE_WORKSPACE"}
    kept = {name: value for name, value in os.environ.items() if name not in foreign}
    return kept | {"PREFECT_HOME": str(tmp_path_factory.mktemp("prefect")), "COLUMNS": "200"}


@contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (
        log.open("wb") as output,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


@dataclass
class Server:
    """A server with a work pool, all deployments, the automations and a worker that can be killed."""

    user: dict[str, str]
    """The environment of its users."""
    logs: Path
    worker: subprocess.Popen[bytes] | None = None

    def start_worker(self) -> None:
        command = [PREFECT, "worker", "start", "--pool", "local"]
        with (self.logs / "worker").open("ab") as output:
            self.worker = subprocess.Popen(command, cwd=ROOT, env=self.user, stdout=output, stderr=subprocess.STDOUT)

    def api(self, method: str, path: str, body: Any = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        request = Request(f"{self.user['PREFECT_API_URL']}{path}", data=content, headers=headers, method=method)
        patience = time.monotonic() + 60
        while True:
            try:
                with urlopen(request, timeout=30) as answer:
                    return json.loads(answer.read() or b"null")
            except HTTPError as error:
                # The server's database was locked for a moment: Prefect's own client asks again, too.
                if error.code != 503 or time.monotonic() > patience:
                    raise
            time.sleep(1)

    def deployment(self, name: str) -> dict[str, Any]:
        return self.api("GET", f"/deployments/name/{name}")

    def start(self, deployment: str, **parameters: Any) -> str:
        """Begin a run; returns its id."""
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return self.api("POST", f"/deployments/{self.deployment(deployment)['id']}/create_flow_run", body)["id"]

    def state(self, run: str) -> dict[str, Any]:
        return self.api("GET", f"/flow_runs/{run}")["state"]

    def wait(self, run: str, *names: str, seconds: float = 240) -> dict[str, Any]:
        """The state of a run once it has one of these names."""
        return until(lambda: (found := self.state(run))["name"] in names and found, seconds, lambda: self.state(run))

    def run(self, deployment: str, **parameters: Any) -> dict[str, Any]:
        return self.wait(self.start(deployment, **parameters), "Completed", "Cached", "Failed", "Crashed")

    def runs(self, deployment: str) -> list[dict[str, Any]]:
        body = {"deployments": {"id": {"any_": [self.deployment(deployment)["id"]]}}, "sort": "EXPECTED_START_TIME_DESC"}
        return self.api("POST", "/flow_runs/filter", body)


@pytest.fixture(scope="module")
def server(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    logs = tmp_path_factory.mktemp("logs")
    api, port = free_address()
    found = Server(environment | {"PREFECT_API_URL": api}, logs)
    with running(
        [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", port], environment, logs / "server"
    ) as process:
        wait_for(f"{api}/health", process)
        prefect(found.user, "work-pool", "create", "local", "--type", "process").check_returncode()
        prefect(found.user, "--no-prompt", "deploy", "--all").check_returncode()
        prefect(found.user, "automation", "create", "--from-file", "automations.yaml").check_returncode()
        found.start_worker()
        try:
            yield found
        finally:
            if found.worker:
                found.worker.terminate()
                try:
                    found.worker.wait(30)
                except subprocess.TimeoutExpired:  # it may wait for runs that are gone: docs/operations.md
                    found.worker.kill()
                    found.worker.wait()


def free_address() -> tuple[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return f"http://127.0.0.1:{port}/api", port


def until(true: Callable[[], Any], seconds: float, said: Callable[[], Any] = lambda: "") -> Any:
    """What `true` gives once it gives something."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := true():
            return found
        time.sleep(0.5)
    raise AssertionError(f"not within {seconds} s: {said()}")


def wait_for(url: str, process: subprocess.Popen[bytes], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        assert process.poll() is None, "the server ended"
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, TimeoutError):
            time.sleep(0.5)
    raise AssertionError(f"{url} did not answer in {seconds} s")


def prefect(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PREFECT, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def experiment(folder: Path, *changes: tuple[str, str]) -> Path:
    """The small study as an experiment called `demo`, which the automation for the deployment train/demo waits for."""
    text = SMALL
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    folder.mkdir(exist_ok=True)
    (folder / "demo.toml").write_text(text)
    return folder / "demo.toml"


def weights(workspace: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in workspace.glob("saes/*/sae_weights.safetensors")}


def times(workspace: Path, kind: str) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in workspace.glob(f"{kind}/*/manifest.json")}


TWO_ARMS = ('arms = ["baseline", "full", "magnitude"]', 'arms = ["baseline", "full"]')


def test_a_study_from_extraction_to_the_scheduled_rerun(server: Server, tmp_path: Path) -> None:
    toml, workspace = experiment(tmp_path / "study", TWO_ARMS), tmp_path / "workspace"
    where = {"experiment": str(toml), "workspace": str(workspace)}

    too_early = server.run("train/demo", **where)
    assert too_early["name"] == "Failed"
    assert too_early["message"].endswith(f"make it with: dasae extract {toml}")

    assert server.run("extract/demo", **where)["name"] == "Completed"
    # Nobody starts the training: the fresh activations do.
    until(lambda: len(server.runs("train/demo")) == 2, 60)
    triggered = server.runs("train/demo")[0]
    assert server.wait(triggered["id"], "Completed", "Failed")["name"] == "Completed"
    assert triggered["parameters"] == where
    assert {name.split("-s0")[0] for name in weights(workspace)} == {"baseline", "full"}

    assert server.run("extract/demo", **where)["name"] == "Cached"
    stores, saes = times(workspace, "stores"), times(workspace, "saes")
    experiment(tmp_path / "study")
    assert server.run("train/demo", **where, arms=["magnitude"])["name"] == "Completed"
    assert times(workspace, "stores") == stores
    after = times(workspace, "saes")
    assert {name for name in after if after[name] != saes.get(name)} == {name for name in after if "magnitude" in name}

    assert server.run("evaluate/demo", **where)["name"] == "Completed"
    assert server.run("ablation/demo", **where)["name"] == "Cached"  # but for the report
    assert (workspace / "reports" / "demo" / "index.html").is_file()
    name = server.runs("ablation/demo")[0]["name"]
    assert name.startswith("ablation demo · ")

    everything = {kind: times(workspace, kind) for kind in ("stores", "probes", "saes", "evaluations")}
    page = (workspace / "reports" / "demo" / "index.html").stat().st_mtime_ns
    soon = datetime.now(UTC).isoformat()
    schedule = {"schedule": {"interval": 3600, "anchor_date": soon}, "active": True, "parameters": where}
    server.api("POST", f"/deployments/{server.deployment('ablation/demo')['id']}/schedules", [schedule])
    scheduled = until(lambda: [run for run in server.runs("ablation/demo") if run["auto_scheduled"]], 60)
    first = min(scheduled, key=lambda run: run["expected_start_time"])
    # Its hour has not come: let it run now.
    server.api("POST", f"/flow_runs/{first['id']}/set_state", {"state": {"type": "SCHEDULED"}, "force": True})
    assert server.wait(first["id"], "Cached", "Completed", "Failed")["name"] == "Cached"
    assert {kind: times(workspace, kind) for kind in everything} == everything
    assert (workspace / "reports" / "demo" / "index.html").stat().st_mtime_ns == page


LONG = ("steps = 120", "steps = 12_000")


@pytest.fixture(scope="module")
def long(study: Study, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict[str, bytes]]:
    """An experiment whose training takes a while, a workspace in which it is extracted, and the weights it must end with."""
    folder = tmp_path_factory.mktemp("long")
    toml = experiment(folder, LONG, TWO_ARMS)
    plan, whole = make_plan(Experiment.load(str(toml))), folder / "whole"
    shutil.copytree(study.workspace.root, whole, ignore=shutil.ignore_patterns("saes", "evaluations", "reports"))
    prepared = Path(shutil.copytree(whole, folder / "prepared"))
    train(plan, Workspace(whole))
    return toml, prepared, weights(whole)


def in_training(server: Server, workspace: Path, toml: Path) -> str:
    """A run that has begun to train."""
    run = server.start("train/demo", experiment=str(toml), workspace=str(workspace))
    logs = workspace / "saes"
    until(lambda: any(path.stat().st_size for path in logs.glob("*/training.jsonl")), 120, lambda: server.state(run))
    return run


def test_a_cancelled_run_saves_what_it_has_and_the_next_goes_on(
    server: Server, long: tuple[Path, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    toml, prepared, expected = long
    workspace = Path(shutil.copytree(prepared, tmp_path / "workspace"))
    run = in_training(server, workspace, toml)
    prefect(server.user, "flow-run", "cancel", run).check_returncode()
    # Straight from Running: never Crashed in between, which would look like a failure to whoever is paged.
    server.wait(run, "Cancelled", seconds=60)
    states = [state["name"] for state in server.api("GET", f"/flow_run_states/?flow_run_id={run}")]
    assert "Crashed" not in states
    checkpoints = sorted(path.stem for path in workspace.glob("saes/*/checkpoint/*.json"))
    assert len(checkpoints) == 2
    assert 0 < int(checkpoints[0]) < 12_000
    assert not weights(workspace)
    assert server.run("train/demo", experiment=str(toml), workspace=str(workspace))["name"] == "Completed"
    assert weights(workspace) == expected


def test_a_run_whose_worker_was_killed_is_marked_and_the_next_goes_on(
    server: Server, long: tuple[Path, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    toml, prepared, expected = long
    workspace = Path(shutil.copytree(prepared, tmp_path / "workspace"))
    run = in_training(server, workspace, toml)
    assert server.worker is not None
    children = subprocess.run(["pgrep", "-P", str(server.worker.pid)], capture_output=True, text=True, check=True).stdout
    server.worker.send_signal(signal.SIGKILL)
    server.worker.wait()
    for child in map(int, children.split()):
        os.kill(child, signal.SIGKILL)
    assert server.state(run)["name"] == "Running"
    marked = server.wait(run, "Crashed", seconds=300)
    # The runs of the tests before ended by themselves, each with its heartbeats: the rule left them alone.
    events = server.api("POST", "/events/filter", {"filter": {"event": {"name": ["prefect.automation.action.failed"]}}})
    assert events["events"] == []
    assert marked["message"] == "No sign of life for 90 seconds. Run it again, it goes on from its last commit."
    server.start_worker()
    assert server.run("train/demo", experiment=str(toml), workspace=str(workspace))["name"] == "Completed"
    assert weights(workspace) == expected


def test_one_arm_that_fails_leaves_its_siblings(server: Server, study: Study, tmp_path: Path) -> None:
    boom = '[arms.boom]\nfrom = "full"\nquestion = "What if it diverges?"\nlearning_rate = 1e30\nlr_warmup = 0\n'
    toml = experiment(tmp_path / "study", ('"magnitude"]', '"magnitude", "boom"]'), ("[evaluate]", f"{boom}\n[evaluate]"))
    workspace = Path(shutil.copytree(study.workspace.root, tmp_path / "workspace"))
    shutil.rmtree(workspace / "saes")
    state = server.run("ablation/demo", experiment=str(toml), workspace=str(workspace))
    assert state["name"] == "Failed"
    assert state["message"].startswith("1 failed: boom seed 0 layer 2: loss not finite at step ")
    assert {name.split("-s0")[0] for name in weights(workspace)} == {"baseline", "full", "magnitude"}
    assert len(times(workspace, "evaluations")) >= 3


def test_two_runs_that_want_the_same_do_the_work_once(
    server: Server, long: tuple[Path, Path, dict[str, bytes]], tmp_path: Path
) -> None:
    toml, prepared, expected = long
    workspace = Path(shutil.copytree(prepared, tmp_path / "workspace"))
    runs = [in_training(server, workspace, toml) for _ in range(2)]
    first = server.wait(runs[0], "Completed", "Failed")
    made = times(workspace, "saes")
    assert {first["name"], server.wait(runs[1], "Cached", "Completed", "Failed")["name"]} == {"Completed", "Cached"}
    assert times(workspace, "saes") == made
    assert weights(workspace) == expected


def test_parameters_are_refused_before_there_is_a_run(server: Server) -> None:
    for parameters in (
        {"arms": ["fulll"]},
        {"seeds": [-1]},
        {"layer": -2},
        {"force": "perhaps"},
    ):
        with pytest.raises(HTTPError) as refused:
            server.start("train/demo", **parameters)
        with refused.value as answer:
            assert answer.code in (409, 422), parameters
    before = len(server.runs("train/demo"))
    misspelt = prefect(server.user, "deployment", "run", "train/demo", "-p", 'armz=["full"]')
    assert misspelt.returncode == 1
    assert "armz" in misspelt.stdout + misspelt.stderr
    assert len(server.runs("train/demo")) == before


def test_two_studies_for_a_gpu_take_turns(server: Server, study: Study, tmp_path: Path) -> None:
    prefect(server.user, "work-queue", "set-concurrency-limit", "gpu", "1", "--pool", "local").check_returncode()
    toml = str(study.workspace.root.parent / "small.toml")
    workspaces = [str(shutil.copytree(study.workspace.root, tmp_path / name)) for name in ("first", "second")]
    deployed = ("ablation/gemma-2b", "ablation/gemma-2-2b")
    runs = [server.start(name, experiment=toml, workspace=place) for name, place in zip(deployed, workspaces, strict=True)]
    for run in runs:
        assert server.wait(run, "Completed", "Cached", "Failed")["name"] == "Cached"
    times = sorted(
        (found["start_time"], found["end_time"]) for found in (server.api("GET", f"/flow_runs/{run}") for run in runs)
    )
    assert times[0][1] <= times[1][0]


def test_every_deployment_exists_and_the_schedules_are_off(server: Server) -> None:
    listed = prefect(server.user, "deployment", "ls").stdout
    for flow in ("extract", "train", "evaluate", "ablation"):
        for name in sorted(path.stem for path in (ROOT / "experiments").glob("*.toml")):
            assert f"{flow}/{name} " in listed
            found = server.deployment(f"{flow}/{name}")
            assert found["description"]
            assert name in found["tags"]
    shipped = server.deployment("ablation/gemma-2-2b")["schedules"]
    assert [schedule["active"] for schedule in shipped] == [False]


def test_a_password_keeps_strangers_out(environment: dict[str, str], tmp_path: Path) -> None:
    api, port = free_address()
    protected = environment | {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_SERVER_API_AUTH_STRING": "admin:a-secret"}
    with running(
        [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", port], protected, tmp_path / "log"
    ) as process:
        wait_for(f"{api}/health", process)

        def status(credentials: str | None) -> int:
            headers = {"Content-Type": "application/json"}
            if credentials:
                headers["Authorization"] = f"Basic {base64.b64encode(credentials.encode()).decode()}"
            try:
                with urlopen(Request(f"{api}/flows/filter", data=b"{}", headers=headers), timeout=30) as answer:
                    return answer.status
            except HTTPError as error:
                with error:
                    return error.code

        assert [status(None), status("admin:wrong"), status("admin:a-secret")] == [401, 401, 200]
        user = environment | {"PREFECT_API_URL": api}
        assert prefect(user, "work-pool", "ls").returncode != 0
        allowed = prefect(user | {"PREFECT_API_AUTH_STRING": "admin:a-secret"}, "work-pool", "ls")
        assert allowed.returncode == 0
        assert "a-secret" not in allowed.stdout + allowed.stderr + (tmp_path / "log").read_text()


def test_the_command_needs_no_server_and_is_quiet(study, environment: dict[str, str], tmp_path: Path):
    workspace = shutil.copytree(study.workspace.root, tmp_path / "workspace")
    command = [sys.executable, "flows.py", str(study.workspace.root.parent / "small.toml"), "--workspace", str(workspace)]
    home = environment.copy()
    del home["PREFECT_HOME"]
    for _ in range(2):
        done = subprocess.run(
            command, cwd=ROOT, env=home | {"HOME": str(tmp_path)}, capture_output=True, text=True, timeout=120, check=False
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "nothing to do" in done.stdout
    assert (workspace / ".prefect" / "prefect.db").is_file()
    assert not list((tmp_path / ".prefect").glob("*"))
