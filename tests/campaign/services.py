"""Kills of a Prefect server, of its worker or of a flow run, then the same run again."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from campaign.cases import Case, Place
from campaign.crashes import STUDIES
from campaign.judge import Verdict, claims, judged, marks
from campaign.studies import Study, made
from campaign.workers import Ended

ROOT = Path(__file__).parents[2]
PREFECT = str(Path(sys.executable).with_name("prefect"))
TARGETS = ("run", "worker", "server", "all")
ROUNDS = 6
LONGEST = 10.0
"""Seconds after the start of a run within which the kill comes; a run takes about as long."""
LIMIT = 240.0
"""Seconds after which a run counts as hanging: a worker looks for late runs and lost heartbeats every minute or two."""
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def kills(home: Path) -> Iterator[Case]:
    """A run of a whole study through a worker, one of them killed at a drawn moment."""
    for name, target, number in product(STUDIES, TARGETS, range(ROUNDS)):
        case = f"{name}-{target}-{number}"
        moment = LONGEST * random.Random(case).random()
        yield Case("prefect", case, partial(_killed, made(home, name), home / "prefect", target, moment))


def _killed(study: Study, prepared: Path, target: str, moment: float, place: Place) -> Verdict:
    workspace = place.fill(study.before("extract"))
    reference = study.reference("report")
    with _Services(_home(prepared, place.folder)) as services:
        services.start()
        first = services.begin(study, workspace)
        services.until(lambda: services.state(first)["type"] not in ("SCHEDULED", "PENDING"))
        time.sleep(moment)
        services.kill(target)
        services.start()
        services.until(services.is_idle)
        what = f"{target} after {moment:.1f} s, the run is {services.state(first)['name']}"
        if services.state(first)["type"] == "COMPLETED" and (wrong := judged(Ended(0, ""), workspace, reference)).detail:
            return Verdict("false-done", f"{what}: {wrong.detail}")
        if false := claims(workspace, reference):
            return Verdict("false-done", f"{what}: {false[0]}")
        before, again = marks(workspace), services.begin(study, workspace)
        state = services.until(lambda: (found := services.state(again))["type"] in ENDED and found)
        if state is None:
            return Verdict("hang", f"{what}: the next run is {services.state(again)['name']}")
        code, said = int(state["type"] != "COMPLETED"), f"{state['name']}: {state['message']}"
        verdict = judged(Ended(code, said), workspace, reference, before)
        return Verdict(verdict.outcome, f"{what}: {verdict.detail}")


def _home(prepared: Path, folder: Path) -> Path:
    """A Prefect home with a work pool and the deployment, copied from one that is made once."""
    if not (prepared / "complete").exists():
        making = folder / "making"
        with _Services(making) as services:
            services.start(worker=False)
            services.prefect("work-pool", "create", "local", "--type", "process")
            services.prefect("--no-prompt", "deploy", "--name", "ablation/demo")
        (making / "complete").touch()
        prepared.parent.mkdir(parents=True, exist_ok=True)
        try:
            making.rename(prepared)
        except OSError:  # another lane was faster
            shutil.rmtree(making)
    return Path(shutil.copytree(prepared, folder / "prefect"))


class _Services:
    """A server and a worker, each in a process group of its own. On leaving, all are killed."""

    def __init__(self, home: Path):
        home.mkdir(exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = str(free.getsockname()[1])
        self.home, self.api = home, f"http://127.0.0.1:{self.port}/api"
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = os.environ | {
            "PREFECT_HOME": str(home), "PREFECT_WORKER_QUERY_SECONDS": "1", "PREFECT_LOGGING_TO_API_ENABLED": "false",
            "PREFECT_API_URL": self.api,
        }  # fmt: skip

    def __enter__(self) -> "_Services":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill("all")

    def start(self, *, worker: bool = True) -> None:
        """Start what is not running."""
        self._start("server", "server", "start", "--host", "127.0.0.1", "--port", self.port)
        healthy = lambda: self.ask("GET", "/health", patience=0) is not None  # noqa: E731
        assert self.until(healthy), "the server does not start"
        if worker:
            self._start("worker", "worker", "start", "--pool", "local")

    def kill(self, target: str) -> None:
        """SIGKILL, as the kernel sends it when memory is short. A run goes on without its worker or server."""
        if target in ("run", "all"):
            for run in self._runs():
                _kill_group(run)
        for name in ("worker", "server"):
            if target in (name, "all") and (process := self.running.pop(name, None)):
                _kill_group(process.pid)
                process.wait()

    def is_idle(self) -> bool:
        """Whether no run has a process."""
        return not self._runs()

    def begin(self, study: Study, workspace: Path) -> str:
        """Begin a run; returns its id."""
        deployment = self.ask("GET", "/deployments/name/ablation/demo")["id"]
        parameters = {"experiment": str(study.toml), "workspace": str(workspace)}
        body = {"parameters": parameters, "state": {"type": "SCHEDULED"}}
        return self.ask("POST", f"/deployments/{deployment}/create_flow_run", body)["id"]

    def state(self, run: str) -> dict[str, Any]:
        """The state of a run."""
        return self.ask("GET", f"/flow_runs/{run}")["state"]

    def ask(self, method: str, path: str, body: Any = None, patience: float = 60) -> Any:
        """The server's answer; None if it has none after so many seconds."""
        content = None if body is None else json.dumps(body).encode()
        request = Request(self.api + path, data=content, headers={"Content-Type": "application/json"}, method=method)
        deadline = time.monotonic() + patience
        while True:
            try:
                with urlopen(request, timeout=30) as answer:
                    return json.loads(answer.read())
            except (URLError, OSError):
                if time.monotonic() > deadline:
                    return None
            time.sleep(0.5)

    def until(self, true: Callable[[], Any]) -> Any:
        """What `true` gives once it gives something; None after the limit."""
        deadline = time.monotonic() + LIMIT
        while time.monotonic() < deadline:
            if found := true():
                return found
            time.sleep(0.3)
        return None

    def prefect(self, *arguments: str) -> None:
        """A command of Prefect's, which must end well."""
        subprocess.run([PREFECT, *arguments], cwd=ROOT, env=self.environment, capture_output=True, check=True)

    def _start(self, name: str, *arguments: str) -> None:
        if name not in self.running:
            with (self.home / f"{name}.log").open("ab") as log:
                self.running[name] = subprocess.Popen(
                    [PREFECT, *arguments], cwd=ROOT, env=self.environment, stdout=log, stderr=log, start_new_session=True
                )

    def _runs(self) -> list[int]:
        """Processes of flow runs: those whose environment names this home, and a run."""
        found: list[int] = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                variables = path.read_bytes().split(b"\0")
            except OSError:  # it has ended, or is another user's
                continue
            if f"PREFECT_HOME={self.home}".encode() in variables and any(b"FLOW_RUN_ID=" in one for one in variables):
                found.append(int(path.parent.name))
        return found


def _kill_group(pid: int) -> None:
    """Kill a process, and its group where it leads one."""
    for kill in (os.killpg, os.kill):
        try:
            kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
