"""Runs the campaign: faults in the real commands, each judged. `make campaign` runs all; see docs/operations.md."""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from campaign.cases import Case, judged_in
from campaign.judge import BAD, GOOD
from campaign.library import CLASSES
from campaign.workers import import_everything

ROOT = Path(__file__).parents[2]
LONGEST = ("prefect", "s3", "machines")
"""Classes whose cases take longest, a minute or so."""


def main() -> int:
    """Run cases; exit code 1 when one ended badly."""
    options = _options()
    import_everything()
    home, code = Path(options.home), _code()
    home.mkdir(parents=True, exist_ok=True)
    # Studies and workspaces in memory where there is such a folder: thousands of copies and fsyncs.
    memory = Path("/dev/shm")
    fast = memory if os.access(memory, os.W_OK) else home
    base = fast / f"dasae-campaign-{hashlib.sha256(str(home.resolve()).encode()).hexdigest()[:8]}"
    results = home / "results.jsonl"
    if not options.summary:
        done = {(entry["class"], entry["case"]) for entry in _entries(results, code)} if not options.case else set()
        cases = [case for case in _chosen(options, base / code) if (case.kind, case.name) not in done]
        random.Random(options.seed).shuffle(cases)
        if options.sample:
            counts: Counter[str] = Counter()
            cases = [case for case in cases if not counts.update([case.kind]) and counts[case.kind] <= options.sample]
        _run(cases, options, base, results, code)
    return _table(_entries(results, code))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="campaign", description="Faults in the real commands, each judged.")
    parser.add_argument("--only", help=f"classes, separated by commas: {', '.join(CLASSES)}")
    parser.add_argument("--case", help="only cases with this in their name; they run again although they were done")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no case after so many")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="cases side by side")
    parser.add_argument("--seed", type=int, default=0, help="of the order of cases")
    parser.add_argument("--sample", type=int, help="so many cases of every class")
    parser.add_argument("--summary", action="store_true", help="only the table of what was found so far")
    parser.add_argument("--home", default=f"{tempfile.gettempdir()}/dasae-campaign", help="folder of results.jsonl")
    return parser.parse_args()


def _chosen(options: argparse.Namespace, home: Path) -> list[Case]:
    names = options.only.split(",") if options.only else list(CLASSES)
    if unknown := set(names) - set(CLASSES):
        sys.exit(f"no class is called {', '.join(sorted(unknown))}; there are {', '.join(CLASSES)}")
    cases = [case for name in names for case in CLASSES[name](home)]
    return [case for case in cases if not options.case or options.case in f"{case.kind} {case.name}"]


def _run(cases: list[Case], options: argparse.Namespace, base: Path, results: Path, code: str) -> None:
    """Run the cases in so many lanes, each a fork that takes the next one when it is free, those that take longest first."""
    cases = sorted(cases, key=lambda case: case.kind not in LONGEST)
    deadline, jobs = time.monotonic() + 60 * options.minutes, max(1, min(options.jobs, len(cases)))
    sys.stdout.flush()
    lanes: list[int] = []
    taken = multiprocessing.Value("q", 0)
    for _ in range(jobs):
        pid = os.fork()
        if pid == 0:
            try:
                while (number := _next(taken)) < len(cases) and time.monotonic() < deadline:
                    _record(cases[number], base / f"lane-{os.getpid()}", results, code)
            finally:
                os._exit(0)
        lanes.append(pid)
    for pid in lanes:
        os.waitpid(pid, 0)


def _next(taken: Any) -> int:
    """The number of the next case, of all lanes."""
    with taken.get_lock():
        taken.value += 1
        return taken.value - 1


def _record(case: Case, folder: Path, results: Path, code: str) -> None:
    started = time.monotonic()
    verdict = judged_in(folder, case)
    entry: dict[str, Any] = {"class": case.kind, "case": case.name, "outcome": verdict.outcome, "detail": verdict.detail}
    line = json.dumps(entry | {"seconds": round(time.monotonic() - started, 2), "code": code})
    with results.open("a") as file:
        file.write(line + "\n")


def _entries(results: Path, code: str) -> list[dict[str, Any]]:
    """The last result of every case with this code."""
    lines = results.read_text().splitlines() if results.exists() else []
    entries = [entry for entry in map(json.loads, lines) if entry["code"] == code]
    return list({(entry["class"], entry["case"]): entry for entry in entries}.values())


def _code() -> str:
    """A hash of the code under test and of the campaign: cases that ran with it need not run again."""
    folders = ("pipeline", "orchestration", "tests/campaign")
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:12]


def _table(entries: list[dict[str, Any]]) -> int:
    """Print classes and outcomes, and every bad case; returns the exit code."""
    counts = Counter((entry["class"], entry["outcome"]) for entry in entries)
    outcomes = [outcome for outcome in (*GOOD, *BAD) if any(counts[kind, outcome] for kind, _ in counts)]
    bad = sorted((entry for entry in entries if entry["outcome"] in BAD), key=lambda entry: (entry["class"], entry["case"]))
    for entry in bad:
        print(f"{entry['outcome']}: {entry['class']} {entry['case']}: {entry['detail']}")
    kinds = sorted({kind for kind, _ in counts})
    for row in (("class", "cases", *outcomes), *(_row(kind, outcomes, counts) for kind in kinds)):
        print(f"{row[0]:14}" + "".join(f"{column:>11}" for column in row[1:]))
    seconds = sum(entry["seconds"] for entry in entries)
    print(f"{len(entries)} faults, {len(bad)} ended badly; {seconds / max(1, len(entries)):.2f} s each")
    return int(bool(bad))


def _row(kind: str, outcomes: list[str], counts: Counter[tuple[str, str]]) -> tuple[str, ...]:
    numbers = [counts[kind, outcome] for outcome in outcomes]
    return (kind, str(sum(numbers)), *map(str, numbers))


if __name__ == "__main__":
    sys.exit(main())
