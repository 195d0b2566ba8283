"""Two commands at a time in one workspace, and clocks that jump."""

import datetime as dt
import os
import random
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from campaign.cases import Case, Place
from campaign.crashes import STUDIES
from campaign.judge import Verdict, differences, files, judged, refused
from campaign.studies import STAGES, Study, made
from campaign.workers import LIMIT, Child, Ended, command, run, start

ROUNDS = 6
YEAR = 365 * 86400.0
COMMANDS = (
    ("extract",), ("extract", "--deep"), ("extract", "--force"), ("train",), ("train", "--force"),
    ("evaluate",), ("evaluate", "--force"), ("report",), ("status",), ("clean",),
)  # fmt: skip


def together(home: Path) -> Iterator[Case]:
    """Every pair of commands, one started a moment after the other."""
    for name, (one, other), number in product(STUDIES, product(COMMANDS, COMMANDS), range(ROUNDS)):
        study = made(home, name)
        case = f"{name}-{'-'.join(one)}-with-{'-'.join(other)}-{number}"
        yield Case("together", case, partial(_both, study, one, other, random.Random(case).random()))


def clocks(home: Path) -> Iterator[Case]:
    """The clock jumps by years, forward and back, while a command runs; files are dated long ago or in the future."""
    for name, stage, number in product(STUDIES, STAGES, range(30)):
        yield Case("clock", f"{name}-{stage}-{number:02}", partial(_jumped, made(home, name), stage, number))


def _both(study: Study, one: tuple[str, ...], other: tuple[str, ...], moment: float, place: Place) -> Verdict:
    stages = [STAGES.index(name) for name, *_ in (one, other) if name in STAGES] or [len(STAGES) - 1]
    # In half of the rounds all that the later one needs is there; else the earlier one makes it meanwhile.
    first = max(stages) if moment < 0.5 else min(stages)
    workspace = place.fill(study.before(STAGES[first]))
    children: list[Child] = []
    for command_line in (one, other):
        children.append(start(command(*_argv(study, workspace, *command_line)), place.folder))
        time.sleep(0.8 * moment)
    for child, command_line in zip(children, (one, other), strict=True):
        if bad := refused(child.wait(2 * LIMIT)):
            for left in children:
                left.wait()
            return Verdict(bad.outcome, f"{' '.join(command_line)}: {bad.detail}")
    ended = Ended(0, "")
    for stage in STAGES[: max(stages) + 1]:
        ended = run(command(*study.argv(stage, workspace)), place.folder)
        if bad := refused(ended):
            return Verdict(bad.outcome, f"afterwards, {stage}: {bad.detail}")
    verdict = judged(ended, workspace, study.reference(STAGES[max(stages)]))
    if verdict.outcome == "litter" and not differences(files(workspace), study.reference("report")):
        return Verdict("equal")
    return verdict


def _argv(study: Study, workspace: Path, name: str, *options: str) -> tuple[str, ...]:
    if name == "clean":
        return ("workspace", "clean", "--yes", "--experiment", str(study.toml), "--workspace", str(workspace))
    return study.argv(name, workspace, *options)


def _jumped(study: Study, stage: str, number: int, place: Place) -> Verdict:
    draw = random.Random(f"{stage}-{number}")
    workspace = place.fill(study.before(stage))
    for path in workspace.rglob("*"):
        dated = draw.choice([0.0, time.time() + 70 * YEAR, time.time()])
        os.utime(path, (dated, dated))
    jumps = [draw.uniform(-30, 30) * YEAR for _ in range(40)]
    jumping = command(*study.argv(stage, workspace), before=lambda: _jump(jumps))
    if number % 2:
        child = start(jumping, place.folder)
        time.sleep(draw.uniform(0, 0.8))
        child.signal(9)
        child.wait()
    if bad := refused(run(jumping, place.folder)):
        return bad
    return judged(run(command(*study.argv(stage, workspace)), place.folder), workspace, study.reference(stage))


def _jump(jumps: list[float]) -> None:
    """Every look at the clock is years from the last one."""
    real, looks = time.time, iter(jumps * 10_000)

    class Jumping(dt.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls.fromtimestamp(time.time(), tz)

    time.time = lambda: real() + next(looks)
    dt.datetime = Jumping
    import pipeline.artefacts.workspace as workspaces

    for name, value in vars(workspaces).items():
        if value is Jumping.__base__:
            setattr(workspaces, name, Jumping)
