"""A Prefect server on a real PostgreSQL, as docs/operations.md sets it up for more than a few runs at a time."""

import json
import os
import pwd
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
from small_study import Study

ROOT = Path(__file__).parents[2]
PREFECT = str(Path(sys.executable).with_name("prefect"))
PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin"))  # Debian's place; they are not on the path there

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PROGRAMS, reason="PostgreSQL is not installed (Debian: apt-get install postgresql)"),
]


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@contextmanager
def running(command: list[str], log: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    with (
        log.open("wb") as output,
        subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options) as process,
    ):
        try:
            yield process
        finally:
            process.terminate()
            process.wait(30)


def wait_until(answers: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not answers():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of an empty database of a PostgreSQL of its own."""
    programs, port, log = PROGRAMS[-1], free_port(), tmp_path_factory.mktemp("postgresql") / "log"
    options: dict[str, Any] = {"cwd": "/"}
    folder = Path(tempfile.mkdtemp(prefix="postgresql"))  # where its user may enter, unlike pytest's folders
    if os.geteuid() == 0:  # as root it does not start
        owner = pwd.getpwnam("postgres")
        os.chown(folder, owner.pw_uid, owner.pw_gid)
        options |= {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
    try:
        make = [programs / "initdb", "--pgdata", folder / "data", "--username", "prefect", "--auth", "trust"]
        subprocess.run(make, check=True, capture_output=True, **options)
        serve = [programs / "postgres", "-D", folder / "data", "-k", folder, "-h", "127.0.0.1", "-p", port]
        there = ["--host", "127.0.0.1", "--port", port, "--username", "prefect"]
        with running([*map(str, serve)], log, **options) as process:
            ready = [programs / "pg_isready", *there]
            wait_until(lambda: subprocess.run(ready, capture_output=True, check=False).returncode == 0, process, log)
            subprocess.run([programs / "createdb", *there, "prefect"], check=True, capture_output=True)
            yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/prefect"
    finally:
        shutil.rmtree(folder)


def test_many_clients_at_once_are_served_and_a_study_runs(database: str, study: Study, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    api = f"http://127.0.0.1:{port}/api"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(tmp_path / "home"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}

    def post(path: str, body: dict[str, Any]) -> Any:
        content = Request(f"{api}{path}", json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urlopen(content, timeout=60) as answer:  # raises for 503, which is what a locked SQLite answers
            return json.load(answer)

    def healthy() -> bool:
        try:
            with urlopen(f"{api}/health", timeout=5):
                return True
        except OSError:
            return False

    server = environment | {"PREFECT_SERVER_DATABASE_CONNECTION_URL": database}
    start = [PREFECT, "server", "start", "--host", "127.0.0.1", "--port", port]
    with running(start, log, env=server, cwd=ROOT) as process:
        wait_until(healthy, process, log)
        flow = post("/flows/", {"name": "several"})["id"]

        def client(_: int) -> list[str]:
            ends: list[str] = []
            for _ in range(5):
                run = post("/flow_runs/", {"flow_id": flow, "state": {"type": "PENDING"}})["id"]
                changes = ({"state": {"type": state}} for state in ("RUNNING", "COMPLETED"))
                ends += [post(f"/flow_runs/{run}/set_state", change)["status"] for change in changes]
            return ends

        with ThreadPoolExecutor(8) as pool:
            assert [status for ends in pool.map(client, range(8)) for status in ends] == ["ACCEPT"] * 80
        workspace = shutil.copytree(study.workspace.root, tmp_path / "workspace")
        command = [
            sys.executable,
            "flows.py",
            str(study.workspace.root.parent / "small.toml"),
            "--workspace",
            str(workspace),
        ]
        client_environment = environment | {"PREFECT_API_URL": api}
        done = subprocess.run(command, cwd=ROOT, env=client_environment, capture_output=True, text=True, check=False)
        assert (done.returncode, "nothing to do" in done.stdout) == (0, True), done.stderr
    assert "locked" not in log.read_text()
    assert not list((tmp_path / "home").glob("*.db"))
