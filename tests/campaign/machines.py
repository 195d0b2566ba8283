"""Two machines that share a workspace on an object store: together, one killed, one asleep until the other took over."""

import random
import signal
import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path

from campaign.cases import Case, Place
from campaign.crashes import STUDIES
from campaign.judge import Verdict, judged, refused
from campaign.object_store import Remote, served
from campaign.studies import STAGES, Study, made
from campaign.workers import LIMIT, Child

ROUNDS = 12
HOWS = ("together", "killed", "asleep", "lost", "after")
"""The last two: both run, and one meets that fault of `proxy.HOWS` at one of its first requests."""
ASLEEP = 6.0
"""Seconds. Longer than a lock lasts here."""


def machines(home: Path) -> Iterator[Case]:
    """The same stage on two machines at once, one of which comes to harm at a drawn moment."""
    server = served(home)
    for name, stage, how, number in product(STUDIES, STAGES[:-1], HOWS, range(ROUNDS)):
        case = f"{name}-{stage}-{how}-{number:02}"
        yield Case("machines", case, partial(_both, made(home, name), stage, server, how, random.Random(case)))


def _both(study: Study, stage: str, server: Path, how: str, draw: random.Random, place: Place) -> Verdict:
    remote = Remote(server, f"two-{study.toml.stem}-{stage}-{how}-{draw.random()}", place)
    argv = study.argv(stage, remote.url)
    try:
        remote.fill(study.before(stage))
        fault = {"how": how, "at": draw.randrange(1, 60)} if how in ("lost", "after") else None
        here = remote.start(argv, "here", fault=fault, before=_hasty)
        time.sleep(draw.random())
        there = remote.start(argv, "there", before=_hasty)
        time.sleep(3 * draw.random())
        if how in ("killed", "asleep"):
            here.signal(signal.SIGKILL if how == "killed" else signal.SIGSTOP)
        if how == "asleep":
            time.sleep(ASLEEP)
            here.signal(signal.SIGCONT)
        if bad := _ended_badly(here, there, how):
            return bad
        last = remote.start(argv, "third", before=_hasty).wait(3 * LIMIT)
        verdict = judged(last, remote.read(), study.reference(stage))
        if verdict.outcome == "equal" and (left := remote.locks()):
            return Verdict("litter", f"locks: {left[:3]}")
        return verdict
    finally:
        remote.remove()


def _ended_badly(here: Child, there: Child, how: str) -> Verdict | None:
    for child, may_die in ((here, how == "killed"), (there, False)):
        ended = child.wait(3 * LIMIT)
        if not (may_die and ended.code == -signal.SIGKILL) and (bad := refused(ended)):
            for left in {here, there} - {child}:
                left.wait(1) if left.output.exists() else None
            return bad
    return None


def _hasty() -> None:
    """Machines wait for seconds, where they would for minutes."""
    from pipeline.artefacts import leases

    leases.LASTS, leases.RENEWED, leases.PAUSE = 4.0, 0.5, 0.2
