"""Faults at single file-system operations of a command: kills, torn writes, errors, signals, power failures."""

import errno
import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from campaign.cases import Case, Place
from campaign.injector import LIST, READ, STAT, WRITE, Action, Injector, fails, kill, send, tear
from campaign.judge import Verdict, claims, judged, marks, refused
from campaign.power_loss import PowerLoss
from campaign.studies import STAGES, Study, made
from campaign.workers import command, run

STUDIES = ("synthetic", "texts")
NewInjector = Callable[[Place], Injector]


def operations(study: Study, stage: str, group: str) -> list[str]:
    """The names of all operations of an undisturbed run of a stage, counted once."""
    note = study.toml.parent / f"operations-{stage}-{group}"
    if not note.exists():
        place = Place(study.toml.parent / f"counting-{stage}-{group}")
        workspace = place.fill(study.before(stage))
        injector = Injector(workspace, (group,), log=place.log)
        ended = run(command(*study.argv(stage, workspace), before=injector), place.folder)
        assert ended.code == 0, ended.output
        note.write_text(place.hit())
    return note.read_text().split()


def kills(home: Path) -> Iterator[Case]:
    """SIGKILL before every change of a file."""
    yield from _at_changes(home, "kill", lambda at, place: Injector(place.workspace, (WRITE,), at, kill, log=place.log))


def torn_writes(home: Path) -> Iterator[Case]:
    """SIGKILL in the middle of every write."""
    new = lambda at, place: Injector(place.workspace, (WRITE,), at, tear, log=place.log)  # noqa: E731
    yield from _at_changes(home, "torn", new, only=("write", "open-w"))


def power_failures(home: Path) -> Iterator[Case]:
    """A power failure before every change of a file: content that was not synced is gone, or names too."""
    for keeps in (True, False):
        new = lambda at, place, keeps=keeps: PowerLoss(place.workspace, at, keeps_names=keeps, log=place.log)  # noqa: E731
        for case in _at_changes(home, "power", new):
            yield Case("power", f"{case.name}-{'content' if keeps else 'names'}", case.run)


def signals(home: Path) -> Iterator[Case]:
    """SIGTERM and Ctrl-C before every change of a file."""
    for name, number in (("term", signal.SIGTERM), ("int", signal.SIGINT)):
        new = lambda at, place, number=number: Injector(place.workspace, (WRITE,), at, send(number), log=place.log)  # noqa: E731
        for case in _at_changes(home, "signal", new):
            yield Case("signal", f"{case.name}-{name}", case.run)


def errors(home: Path) -> Iterator[Case]:
    """An error of the machine at every change: once, from then on, or for that file."""
    yield from _errors(home, "error-write", WRITE, (errno.ENOSPC, errno.EIO, errno.EACCES))


def reading_errors(home: Path) -> Iterator[Case]:
    """An error of the machine at every opening or read."""
    yield from _errors(home, "error-read", READ, (errno.EIO, errno.EACCES, errno.ESTALE))


def listing_errors(home: Path) -> Iterator[Case]:
    """An error of the machine at every listing of a folder."""
    yield from _errors(home, "error-list", LIST, (errno.EIO, errno.EACCES, errno.ESTALE))


def stat_errors(home: Path) -> Iterator[Case]:
    """An error of the machine at every look at a file's size or kind."""
    yield from _errors(home, "error-stat", STAT, (errno.EIO, errno.EACCES, errno.ESTALE))


def crashed(study: Study, stage: str, new: NewInjector, place: Place) -> Verdict:
    """A stage with a fault, then without."""
    workspace = place.fill(study.before(stage))
    argv = study.argv(stage, workspace)
    first = run(command(*argv, before=new(place)), place.folder)
    if not (hit := place.hit()):
        return Verdict("harmless", "never reached")
    if bad := refused(first):
        return Verdict(bad.outcome, f"at {hit}: {bad.detail}")
    reference = study.reference(stage)
    if false := claims(workspace, reference):
        return Verdict("false-done", f"at {hit}: {false[0]}")
    before = marks(workspace)
    verdict = judged(run(command(*argv), place.folder), workspace, reference, before)
    return Verdict(verdict.outcome, f"at {hit}: {verdict.detail}")


def _at_changes(home: Path, kind: str, new: Callable[[int, Place], Injector], only: tuple[str, ...] = ()) -> Iterator[Case]:
    for name in STUDIES:
        study = made(home, name)
        for stage in STAGES:
            for at, operation in enumerate(operations(study, stage, WRITE), start=1):
                if not only or operation in only:
                    yield Case(kind, f"{name}-{stage}-{at:04}", partial(crashed, study, stage, partial(new, at)))


def _errors(home: Path, kind: str, group: str, numbers: tuple[int, ...]) -> Iterator[Case]:
    for name in STUDIES:
        study = made(home, name)
        for stage in STAGES:
            for at in range(1, len(operations(study, stage, group)) + 1):
                draw = random.Random(f"{name}-{stage}-{at}")
                number, again = draw.choice(numbers), draw.choice(("once", "always", "path"))
                new = partial(_failing, group, at, fails(number), again)
                case = f"{name}-{stage}-{at:04}-{errno.errorcode[number].lower()}-{again}"
                yield Case(kind, case, partial(crashed, study, stage, new))


def _failing(group: str, at: int, action: Action, again: str, place: Place) -> Injector:
    return Injector(place.workspace, (group,), at, action, again=again, log=place.log)
