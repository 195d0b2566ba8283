"""Says what came of a fault: compares a workspace byte for byte with that of an undisturbed run, recorded times left out."""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from campaign.workers import OUTPUT, Ended

GOOD = ("equal", "detected", "harmless")
"""`equal`: the same command afterwards ends with the bytes of an undisturbed run. `detected`: refused in one line, and what
the line says helps. `harmless`: the fault was not reached, or nothing reads what it hit."""
BAD = ("silent", "lost", "stuck", "false-done", "hang", "outside", "traceback", "litter", "broken-case")
"""`silent`: exit code 0 and other bytes. `lost`: what was complete is made again or gone. `stuck`: the same command never
ends well. `false-done`: said to be finished and is not. `hang`: no end. `outside`: something outside the workspace has
changed. `traceback`: an error that is not one line. `litter`: files that nobody owns. `broken-case`: the
campaign itself failed."""
TIMES = {
    "seconds", "tokens_per_second", "generated", "datetime_epoch_millis", "eval_id", "finished", "host", "cost", "made_of",
    "model_seconds", "extract_seconds", "train_seconds", "evaluate_seconds", "seal",
}  # fmt: skip
"""Entries of JSON files that differ between two runs: times, names of runs, and hashes over those."""
WITH_TIMES = ("training.jsonl", "matching.json", "sparse_probing.json", "results.json", "results.csv", "index.html")


@dataclass(frozen=True)
class Verdict:
    """The outcome of a case."""

    outcome: str
    detail: str = ""


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by name, without locks."""
    found: dict[str, bytes] = {}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != ".locks"]
        for path in (Path(parent, name) for name in names if not name.startswith(OUTPUT)):
            if path.is_file():
                found[path.relative_to(folder).as_posix()] = path.read_bytes()
    return found


def comparable(name: str, content: bytes) -> Any:
    """The content of a file without recorded times."""
    base = name.rpartition("/")[2]
    try:
        if base == "training.jsonl":
            return [_without_times(json.loads(line)) for line in content.splitlines()]
        if base.endswith(".json"):
            value = _without_times(json.loads(content))
            if base == "manifest.json":
                value["parents"] = sorted(value.get("parents", ()))
                value["files"] = {file: None if file in WITH_TIMES else known for file, known in value["files"].items()}
            return value
        if base == "results.csv":
            rows = list(csv.DictReader(io.StringIO(content.decode())))
            return [_without_times(row) for row in rows]
        if base == "index.html":
            return _page_without_times(content.decode())
    except (ValueError, KeyError, TypeError, AttributeError):
        return content
    return content


def differences(found: Mapping[str, bytes], reference: Mapping[str, bytes]) -> list[str]:
    """What is missing or has other bytes, and manifests that are not true of their files."""
    wrong = [f"missing {name}" for name in reference if name not in found]
    for name in reference.keys() & found.keys():
        here, there = found[name], reference[name]
        if here != there and comparable(name, here) != comparable(name, there):
            wrong.append(f"differs {name}")
    return sorted(wrong) + untrue_manifests(found)


def untrue_manifests(found: Mapping[str, bytes]) -> list[str]:
    """Files that are not what the manifest of their artefact says."""
    wrong: list[str] = []
    for name, content in found.items():
        folder, _, base = name.rpartition("/")
        if base != "manifest.json":
            continue
        try:
            records: dict[str, Any] = json.loads(content)["files"]
            for file, record in records.items():
                body = found.get(f"{folder}/{file}")
                if body is None or hashlib.sha256(body).hexdigest() != record["sha256"]:
                    wrong.append(f"not as in its manifest {folder}/{file}")
        except (ValueError, KeyError, TypeError):
            wrong.append(f"unreadable {name}")
    return wrong


def marks(workspace: Path) -> dict[str, tuple[int, int]]:
    """Which making of every manifest and commit is there. `dasae report` always writes anew: reports do not count."""
    paths = [*workspace.glob("*/*/manifest.json"), *workspace.glob("*/*/commits/*.json")]
    paths = [path for path in paths if path.relative_to(workspace).parts[0] != "reports"]
    return {path.relative_to(workspace).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns) for path in paths}


def claims(workspace: Path, reference: Mapping[str, bytes]) -> list[str]:
    """Artefacts that have a manifest, and so are taken for finished, although they are not as in the reference."""
    found = files(workspace)
    finished = {name.rpartition("/")[0] for name in found if name.count("/") == 2 and name.endswith("/manifest.json")}
    places = tuple(f"{folder}/" for folder in finished)
    expected = {name: content for name, content in reference.items() if name.startswith(places)}
    return differences({name: found[name] for name in found if name in expected}, expected)


def refused(ended: Ended) -> Verdict | None:
    """The verdict on a command that hung or ended in a traceback; None where it ended as a command may."""
    if ended.code is None:
        return Verdict("hang", ended.last_line)
    return Verdict("traceback", ended.last_line) if ended.has_traceback else None


def judged(
    again: Ended, workspace: Path, reference: Mapping[str, bytes], before: Mapping[str, tuple[int, int]] | None = None
) -> Verdict:
    """The verdict after the same command ran `again`. `before`: manifests and commits that must not be made anew."""
    if again.code is None:
        return Verdict("hang", again.last_line)
    if again.code:
        return Verdict("stuck", f"exit {again.code}: {again.last_line}")
    found = files(workspace)
    if wrong := differences(found, reference):
        return Verdict("silent", "; ".join(wrong[:4]))
    now = marks(workspace)
    if gone := [name for name, mark in (before or {}).items() if now.get(name) != mark]:
        return Verdict("lost", f"made again: {', '.join(gone[:4])}")
    if extra := sorted(found.keys() - reference.keys()):
        return Verdict("litter", ", ".join(extra[:4]))
    return Verdict("equal")


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items() if key not in TIMES}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def _page_without_times(page: str) -> str:
    page = re.sub(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d[\d:+Z.]*|\d+ [A-Z][a-z]+ \d{4}( at)?,? \d\d:\d\d( UTC)?", "DATE", page)
    page = re.sub(r"(\d+(\.\d+)?(\s|&nbsp;)(ms|s|min|h|seconds?|minutes?)\b\s*)+", "TIME ", page)
    page = re.sub(r"<dt>seconds</dt><dd>[^<]*</dd>", "", page)
    return re.sub(r"(?m)^\s*<td>\d+\.\d</td>\n", "", page)  # seconds of training, by SAE
