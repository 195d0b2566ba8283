"""What the way over Prefect costs: a deployed run of `ablation` against `dasae ablate`, on the same experiment.

    python benchmarks/prefect_overhead.py [--experiment demo] [--rounds 1]

Starts a server and a worker of its own on the loopback interface, then runs the study both ways in turn, each in an empty
workspace, and once more with nothing to do. Takes twice the study's time for every round.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from measure import show

BIN = Path(sys.executable).parent
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


def main() -> None:
    """Both ways in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="demo")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        api = f"http://127.0.0.1:{port}/api"
        server = os.environ | {"PREFECT_HOME": f"{temporary}/prefect", "DO_NOT_TRACK": "1"}
        server |= {"PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        user = server | {"PREFECT_API_URL": api}
        prefect = str(BIN / "prefect")
        stack.enter_context(running([prefect, "server", "start", "--host", "127.0.0.1", "--port", port], server))
        while True:
            try:
                urlopen(f"{api}/health", timeout=5).close()
                break
            except (URLError, TimeoutError):
                time.sleep(0.5)
        seconds([prefect, "work-pool", "create", "local", "--type", "process"], user)
        seconds([prefect, "--no-prompt", "deploy", "--name", "demo"], user)
        stack.enter_context(running([prefect, "worker", "start", "--pool", "local"], user))
        rows: list[list[str]] = []
        for number in range(args.rounds):
            places = {name: f"{temporary}/{name}-{number}" for name in ("direct", "prefect")}
            direct = [str(BIN / "dasae"), "ablate", args.experiment, "--workspace", places["direct"]]
            parameters = ["-p", f"experiment={args.experiment}", "-p", f"workspace={places['prefect']}"]
            deployed = [prefect, "deployment", "run", "ablation/demo", "--watch", *parameters]
            for what in ("the whole study", "nothing to do"):
                times = seconds(direct, user), seconds(deployed, user)
                rows.append([what, *(f"{value:.1f}" for value in times), f"{times[1] - times[0]:+.1f}"])
        columns = ["", "dasae ablate, s", "prefect deployment run, s", "difference, s (at most 10)"]
        show(f"the experiment {args.experiment}", columns, rows)


if __name__ == "__main__":
    main()
