"""Everything that a user of a Prefect server types, against a real server and worker."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

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


@pytest.fixture(scope="module")
def server(environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A server with a work pool, all deployments and a worker; yields the environment of its users."""
    logs = tmp_path_factory.mktemp("logs")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    api = f"http://127.0.0.1:{port}/api"
    user = environment | {"PREFECT_API_URL": api, "PREFECT_WORKER_QUERY_SECONDS": "1"}
    with running(
        [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", port], environment, logs / "server"
    ) as process:
        wait_for(f"{api}/health", process)
        prefect(user, "work-pool", "create", "local", "--type", "process").check_returncode()
        prefect(user, "--no-prompt", "deploy", "--all").check_returncode()
        with running([PREFECT, "worker", "start", "--pool", "local"], user, logs / "worker"):
            yield user


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


def test_the_stages_run_as_deployments_and_are_cached_the_second_time(
    server: dict[str, str], small_toml: Path, tmp_path: Path
):
    def run(deployment: str) -> tuple[int, str]:
        parameters = ["-p", f"experiment={small_toml}", "-p", f"workspace={tmp_path / 'workspace'}"]
        done = prefect(server, "deployment", "run", deployment, "--watch", *parameters)
        return done.returncode, done.stdout.strip().splitlines()[-1]

    failed, completed, cached = (
        (1, "Flow run finished in state 'Failed'."),
        (0, "Flow run finished successfully in 'Completed'."),
        (0, "Flow run finished successfully in 'Cached'."),
    )
    assert run("train/demo") == failed
    assert run("extract/demo") == completed
    assert run("train/demo") == completed
    assert run("evaluate/demo") == completed
    assert run("ablation/demo") == cached
    assert (tmp_path / "workspace" / "reports" / "small" / "index.html").is_file()


def test_every_deployment_exists_and_the_schedules_are_off(server: dict[str, str]):
    listed = prefect(server, "deployment", "ls").stdout
    for flow in ("extract", "train", "evaluate", "ablation"):
        for experiment in ("demo", "gemma-2-2b", "gemma-2b"):
            assert f"{flow}/{experiment} " in listed
    with urlopen(f"{server['PREFECT_API_URL']}/deployments/name/ablation/demo", timeout=30) as answer:
        schedules = json.load(answer)["schedules"]
    assert [schedule["active"] for schedule in schedules] == [False]


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
