"""A seeded sample of the campaign, every class at least once, and whether its judge can find fault at all."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from campaign.cases import Case, Place, judged_in
from campaign.judge import Verdict, judged, refused
from campaign.library import CLASSES
from campaign.workers import Ended

ROOT = Path(__file__).parents[2]


def campaign(home: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "campaign", "--home", str(home), *options],
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("each", [1, pytest.param(25, marks=pytest.mark.slow)])
def test_no_fault_ends_badly(tmp_path: Path, each: int) -> None:
    ended = campaign(tmp_path, "--sample", str(each))
    assert ended.returncode == 0, ended.stdout + ended.stderr
    entries = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert Counter(entry["class"] for entry in entries) == dict.fromkeys(CLASSES, each)


GOOD = Ended(0, "done")


@pytest.mark.parametrize(
    ("found", "again", "outcome"),
    [
        ({"saes/a/cfg.json": b"{}"}, GOOD, "equal"),
        ({"saes/a/cfg.json": b"{ }"}, GOOD, "equal"),
        ({"saes/a/cfg.json": b'{"l0": 1}'}, GOOD, "silent"),
        ({}, GOOD, "silent"),
        ({"saes/a/cfg.json": b"{}", "saes/a/left": b""}, GOOD, "litter"),
        ({"saes/a/cfg.json": b"{}"}, Ended(1, "error: no"), "stuck"),
        ({"saes/a/cfg.json": b"{}"}, Ended(None, ""), "hang"),
    ],
)
def test_the_judge_tells_outcomes_apart(tmp_path: Path, found: dict[str, bytes], again: Ended, outcome: str) -> None:
    for name, content in found.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert judged(again, tmp_path, {"saes/a/cfg.json": b"{}"}).outcome == outcome


def test_work_that_is_done_again_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "saes/a/manifest.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"files": {}}')
    reference = {"saes/a/manifest.json": path.read_bytes()}
    assert judged(GOOD, tmp_path, reference, {"saes/a/manifest.json": (0, 0)}).outcome == "lost"


def test_tracebacks_and_changes_outside_are_told(tmp_path: Path) -> None:
    traceback = refused(Ended(1, "Traceback (most recent call last):\n  File\nOSError: no"))
    assert traceback
    assert traceback.outcome == "traceback"
    assert refused(Ended(1, "error: no")) is None

    def spoil(place: Place) -> Verdict:
        (place.outside / "precious").unlink()
        return Verdict("equal")

    assert judged_in(tmp_path / "case", Case("any", "spoil", spoil)).outcome == "outside"
    assert judged_in(tmp_path / "case", Case("any", "broken", lambda _: Verdict(str(1 // 0)))).outcome == "broken-case"
