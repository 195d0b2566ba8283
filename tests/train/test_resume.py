"""Training that is killed or asked to stop, by real signals, and ends with the weights of an undisturbed run."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from small_study import Study

from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError, StorageError
from pipeline.sae.formats import WEIGHTS
from pipeline.study.experiment import Experiment
from pipeline.study.plan import TRAINING_LOG, Plan, make_plan
from pipeline.train import checkpoint
from pipeline.train.log import Log
from pipeline.train.training import train

STEPS = 2000
TRAIN = """
import os, sys
from pipeline.cli import main
from pipeline.train import checkpoint, cohort
import pipeline.train.training as stage
*arguments, signal, first = sys.argv[1:]
save = checkpoint.save

def save_and_signal(folder, state, step, facts):
    save(folder, state, step, facts)
    if step >= int(first):
        checkpoint.save = save  # once: the second Ctrl-C would end it at once
        os.kill(os.getpid(), int(signal))

checkpoint.save = save_and_signal
stage.train.__kwdefaults__["save_every"] = 0.1
cohort.SAVING_SHARE = float("inf")  # or a busy disk would make them rare
sys.argv = ["dasae", "train", arguments[0], "--workspace", arguments[1]]
main()
"""
"""Sends itself a signal with the first checkpoint from a step on: from outside, a busy machine would send it too late."""


def longer(study: Study, folder: Path) -> tuple[Path, Plan, Workspace]:
    """The small study with more steps, in a workspace of its own that has the same store."""
    from small_study import SMALL

    toml = folder / "small.toml"
    toml.write_text(SMALL.replace("steps = 120", f"steps = {STEPS}"))
    workspace = Workspace(folder / "workspace")
    workspace.local.mkdir()
    for kind in ("models", "stores", "probes"):
        (workspace.local / kind).symlink_to(study.workspace.local.resolve() / kind)
    experiment: Experiment = Experiment.load(str(toml))
    return toml, make_plan(experiment), workspace


def trained_until(toml: Path, workspace: Workspace, request: signal.Signals, step: int) -> subprocess.CompletedProcess[str]:
    """Training in a process of its own that gets a signal at the first checkpoint from `step` on."""
    command = [sys.executable, "-c", TRAIN, str(toml), str(workspace.root), str(int(request)), str(step)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ, check=False, timeout=180)


def reached(plan: Plan, workspace: Workspace) -> int:
    """The last step that every SAE of the plan has a checkpoint of."""
    found = [
        {int(path.stem) for path in (workspace.folder(sae.artefact) / checkpoint.FOLDER).glob("*.json")} for sae in plan.saes
    ]
    return max(set[int].intersection(*found), default=0)


def results(plan: Plan, workspace: Workspace) -> dict[str, tuple[bytes, list[dict[str, float]]]]:
    """Weights and log of every SAE; the pace is the only part of a log that differs between runs."""
    found = {}
    for sae in plan.saes:
        folder = workspace.folder(sae.artefact)
        records = [json.loads(line) for line in (folder / TRAINING_LOG).read_text().splitlines()]
        for record in records:
            del record["tokens_per_second"]
        found[sae.arm] = ((folder / WEIGHTS).read_bytes(), records)
    return found


def test_killed_and_stopped_training_ends_with_the_same_weights(study: Study, tmp_path: Path) -> None:
    (tmp_path / "undisturbed").mkdir()
    (tmp_path / "disturbed").mkdir()
    _, plan, calm = longer(study, tmp_path / "undisturbed")
    train(plan, calm)
    toml, plan, workspace = longer(study, tmp_path / "disturbed")
    for step in (200, 900):
        assert trained_until(toml, workspace, signal.SIGKILL, step).returncode == -signal.SIGKILL
    assert reached(plan, workspace) > 0
    for request, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        before = reached(plan, workspace)
        stopped = trained_until(toml, workspace, request, before + 100)
        assert stopped.returncode == code
        assert "error: stopped on request after step" in stopped.stderr
        assert "Traceback" not in stopped.stderr
        assert reached(plan, workspace) > before
    assert not any(workspace.manifest(sae.artefact) for sae in plan.saes)

    assert len(train(plan, workspace).made) == 3
    assert results(plan, workspace) == results(plan, calm)
    assert not list(workspace.local.glob(f"saes/*/{checkpoint.FOLDER}"))


def test_a_damaged_checkpoint_is_not_gone_on_from(tmp_path: Path) -> None:
    state = {"a": torch.arange(4.0)}
    checkpoint.save(tmp_path, state, 10, {"seconds": 1.5})
    checkpoint.save(tmp_path, state, 20, {"seconds": 3})
    assert checkpoint.steps(tmp_path) == {10, 20}
    loaded, facts = checkpoint.load(tmp_path, 10)
    assert torch.equal(loaded["a"], state["a"])
    assert facts["seconds"] == 1.5
    path = tmp_path / checkpoint.FOLDER / "000000020.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    assert checkpoint.steps(tmp_path) == {10}
    (tmp_path / checkpoint.FOLDER / "000000010.safetensors").unlink()
    assert checkpoint.steps(tmp_path) == set()


def two_checkpoints(folder: Path) -> Path:
    """A log with checkpoints after its second and its fourth line; returns the folder of the checkpoints."""
    with closing(Log(folder / TRAINING_LOG, b"")) as log:
        for step in range(1, 5):
            log.write(json.dumps({"step": step, "fvu": 0.5}) + "\n")
            if step % 2 == 0:
                checkpoint.save(folder, {"a": torch.full((4,), float(step))}, step, {"seconds": 1.5})
    assert checkpoint.resume_points([folder]) == {4: [0]}
    return folder / checkpoint.FOLDER


def edited(path: Path, old: bytes, new: bytes) -> None:
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))


DAMAGE: dict[str, tuple[Callable[[Path], object], int]] = {
    "record torn": (lambda place: os.truncate(place / "000000004.json", 20), 2),
    "record empty": (lambda place: os.truncate(place / "000000004.json", 0), 2),
    "record no object": (lambda place: (place / "000000004.json").write_text("[4]"), 2),
    "record of another kind": (lambda place: (place / "000000004.json").write_text('{"step": 4}'), 2),
    "record without UTF-8": (lambda place: (place / "000000004.json").write_bytes(b'"\xff"'), 2),
    "seconds edited": (lambda place: edited(place / "000000004.json", b'"seconds": 1.5', b'"seconds": 9.5'), 2),
    "tensors gone": (lambda place: (place / "000000004.safetensors").unlink(), 2),
    "record of another step": (lambda place: shutil.copy(place / "000000002.json", place / "000000004.json"), 2),
    "last line torn": (lambda place: os.truncate(place.parent / TRAINING_LOG, 90), 2),
    "last line flipped": (lambda place: edited(place.parent / TRAINING_LOG, b'"step": 4', b'"step": 7'), 2),
    "first line flipped": (lambda place: edited(place.parent / TRAINING_LOG, b'"step": 1', b'"step": 7'), 0),
    "log gone": (lambda place: (place.parent / TRAINING_LOG).unlink(), 0),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_training_goes_on_from_the_last_good_point_and_says_so(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = two_checkpoints(tmp_path)
    do, good = DAMAGE[damage]
    do(place)
    assert checkpoint.resume_points([tmp_path]) == {good: [0]}
    told = capsys.readouterr().err
    which, begins = ("4", "from step 2") if good else ("2, 4", "from the start")
    assert told == f"{tmp_path}: the checkpoint of step {which} or its log is damaged; training goes on {begins}\n"


def test_a_checkpoint_of_an_earlier_version_is_taken_again(tmp_path: Path) -> None:
    place = two_checkpoints(tmp_path)
    record = json.loads((place / "000000004.json").read_text())
    (place / "000000004.json").write_text(json.dumps({name: record[name] for name in ("step", "sha256", "seconds")}))
    assert checkpoint.steps(tmp_path) == {2}


def test_what_was_logged_after_a_checkpoint_is_no_damage(tmp_path: Path) -> None:
    two_checkpoints(tmp_path)
    with (tmp_path / TRAINING_LOG).open("a") as log:
        log.write('{"step": 5, "fv')
    assert checkpoint.steps(tmp_path) == {2, 4}


def test_nothing_is_removed_through_a_link(tmp_path: Path) -> None:
    two_checkpoints(tmp_path / "elsewhere")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / checkpoint.FOLDER).symlink_to(tmp_path / "elsewhere" / checkpoint.FOLDER)
    for use in (
        lambda: checkpoint.resume_points([tmp_path / "here"]),
        lambda: checkpoint.remove(tmp_path / "here"),
        lambda: checkpoint.save(tmp_path / "here", {}, 6, {}),
    ):
        with pytest.raises(BadInputError, match=r"checkpoint is a link, .*; remove it and run again"):
            use()
    assert checkpoint.steps(tmp_path / "elsewhere") == {2, 4}


def test_a_log_that_is_a_link_is_replaced_and_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("precious")
    (tmp_path / TRAINING_LOG).symlink_to(tmp_path / "precious.txt")
    with closing(Log(tmp_path / TRAINING_LOG, b"")) as log:
        log.write("line\n")
    assert (tmp_path / "precious.txt").read_text() == "precious"
    assert (tmp_path / TRAINING_LOG).read_text() == "line\n"


def test_a_log_that_the_disk_does_not_take_is_named(tmp_path: Path) -> None:
    with closing(Log(tmp_path / TRAINING_LOG, b"")) as log, Path("/dev/full").open("ab", buffering=0) as full:
        log.close()
        log._file = full
        with pytest.raises(StorageError, match=r"training\.jsonl cannot be written: No space left on device"):
            log.write("line\n")


@pytest.mark.parametrize(
    ("there", "expected"),
    [
        ([{100, 200}, {100}], {100: [0, 1]}),
        ([{100, 200}, {200}, set()], {200: [0, 1], 0: [2]}),
        ([{100}, {200}], {100: [0], 200: [1]}),
        ([set(), set()], {0: [0, 1]}),
    ],
)
def test_a_cohort_goes_on_together_where_it_can(
    tmp_path: Path, there: list[set[int]], expected: dict[int, list[int]]
) -> None:
    folders = [tmp_path / str(index) for index in range(len(there))]
    for folder, steps in zip(folders, there, strict=True):
        for step in steps:
            checkpoint.save(folder, {"a": torch.zeros(1)}, step, {})
    assert checkpoint.resume_points(folders) == expected


def test_all_but_the_last_checkpoint_are_removed(tmp_path: Path) -> None:
    for step in (10, 20):
        checkpoint.save(tmp_path, {"a": torch.zeros(1)}, step, {})
    checkpoint.remove(tmp_path, but=20)
    assert checkpoint.steps(tmp_path) == {20}
    checkpoint.remove(tmp_path)
    assert not (tmp_path / checkpoint.FOLDER).exists()
    checkpoint.remove(tmp_path)
