"""What the way over Prefect costs: a deployed run of `ablation` against `dasae ablate`, on the same experiment.

    python benchmarks/prefect_overhead.py [--experiment demo] [--rounds 1] [--idle 10]

Starts a server and a worker of its own on the loopback interface. Runs the study both ways in turn, each in an empty
workspace; a round takes twice the study's time. Then does so with nothing to do, again and again.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

from measure import show

BIN = Path(sys.executable).parent
PREFECT = str(BIN / "prefect")
ROOT = Path(__file__).parents[1]


@contextmanager
def running(command: list[str], environment: dict[str, str]) -> Generator[None]:
    """A process in the background, ended with the block."""
    quiet = subprocess.DEVNULL
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=quiet, stderr=quiet) as process:
        try:
            yield
        finally:
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:  # it may wait for runs that are gone: docs/operations.md
                process.kill()


def seconds(command: list[str], environment: dict[str, str]) -> float:
    """How long a command takes; it must succeed."""
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return time.perf_counter() - started


@contextmanager
def serving(folder: str) -> Generator[dict[str, str]]:
    """A server, a worker and the deployments of the demo, as docs/operations.md starts them; yields a user's environment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    server = os.environ | {"PREFECT_HOME": f"{folder}/prefect", "DO_NOT_TRACK": "1"}
    server |= {"PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    user = server | {"PREFECT_API_URL": f"http://127.0.0.1:{port}/api"}
    with ExitStack() as stack:
        stack.enter_context(running([PREFECT, "server", "start", "--host", "127.0.0.1", "--port", port], server))
        while True:
            try:
                urlopen(f"{user['PREFECT_API_URL']}/health", timeout=5).close()
                break
            except (URLError, TimeoutError):
                time.sleep(0.5)
        seconds([PREFECT, "work-pool", "create", "local", "--type", "process"], user)
        seconds([PREFECT, "--no-prompt", "deploy", "--name", "demo"], user)
        stack.enter_context(running([PREFECT, "worker", "start", "--pool", "local"], user))
        yield user


def last_run(user: dict[str, str]) -> tuple[float, float]:
    """Seconds until the last run began, and from then to its end, on the server. It must have found nothing to do."""
    body = json.dumps({"sort": "EXPECTED_START_TIME_DESC", "limit": 1}).encode()
    headers = {"Content-Type": "application/json"}
    with urlopen(Request(f"{user['PREFECT_API_URL']}/flow_runs/filter", body, headers), timeout=30) as answer:
        (run,) = json.load(answer)
    if run["state_name"] != "Cached":
        raise SystemExit(f"the run ended {run['state_name']}: {run['state']['message']}")
    asked, began, ended = (datetime.fromisoformat(run[name]) for name in ("expected_start_time", "start_time", "end_time"))
    return (began - asked).total_seconds(), (ended - began).total_seconds()


def main() -> None:
    """Both ways in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="demo")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--idle", type=int, default=10, help="rounds with nothing to do")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, serving(temporary) as user:

        def both(direct: str, deployed: str) -> tuple[float, float]:
            parameters = ["-p", f"experiment={args.experiment}", "-p", f"workspace={deployed}"]
            return (
                seconds([str(BIN / "dasae"), "ablate", args.experiment, "--workspace", direct], user),
                seconds([PREFECT, "deployment", "run", "ablation/demo", "--watch", *parameters], user),
            )

        whole = [both(f"{temporary}/direct-{number}", f"{temporary}/prefect-{number}") for number in range(args.rounds)]
        finished = f"{temporary}/finished"
        seconds([str(BIN / "dasae"), "ablate", args.experiment, "--workspace", finished], user)
        idle: list[tuple[float, ...]] = []
        for _ in range(args.idle):
            times = both(finished, finished)
            idle.append((*times, times[1] - times[0], *last_run(user)))
    columns = ["", "dasae ablate, s", "prefect deployment run, s", "difference, s"]
    rows = [["the whole study", *(f"{value:.1f}" for value in (*pair, pair[1] - pair[0]))] for pair in whole]
    if rows:
        show(f"the experiment {args.experiment}", columns, rows)
    columns += ["asked for to start, s", "start to end, s"]
    shown = {"median": statistics.median, "maximum": max}
    rows = [[name, *(f"{of(values):.1f}" for values in zip(*idle, strict=True))] for name, of in shown.items()]
    show(f"the same with nothing to do, {args.idle} times", columns, rows)


if __name__ == "__main__":
    main()
