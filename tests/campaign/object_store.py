"""Faults at single requests to an object store: refused, done without an answer, done twice, an old listing, an outage."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path

from campaign import proxy
from campaign.cases import Case, Place
from campaign.crashes import STUDIES
from campaign.judge import Verdict, claims, judged, refused
from campaign.studies import STAGES, Study, made
from campaign.workers import LIMIT, Child, Ended, command, run, start

ROUNDS = 120
"""Cases of each stage, at shares of its requests: counting them takes a minute."""
SLOW = 0.1
"""Share of the cases in which the server is silent: a client waits for half a minute."""


def requests(home: Path) -> Iterator[Case]:
    """Requests of every stage with drawn faults, then the same command without."""
    server = served(home)
    for name, stage, number in product(STUDIES, STAGES, range(ROUNDS)):
        draw = random.Random(f"{name}-{stage}-{number}")
        hows = [how for how in proxy.HOWS if how != "silent" or draw.random() < SLOW * len(proxy.HOWS)]
        run = partial(_harmed, made(home, name), stage, server, how := draw.choice(hows), (number + draw.random()) / ROUNDS)
        yield Case("s3", f"{name}-{stage}-{number:03}-{how}", run)


def served(home: Path) -> Path:
    """The folder of a running server, which ends with this process."""
    folder = home / f"server-{os.getpid()}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "port").exists():
        for old in home.glob("server-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
        with (folder / "output").open("w") as output:
            subprocess.Popen([sys.executable, "-m", "campaign.proxy", str(folder), str(os.getpid())], stderr=output)
        deadline = time.monotonic() + 60
        while not (folder / "port").exists():
            assert time.monotonic() < deadline, "the S3 server does not start"
            time.sleep(0.1)
    return folder


def _harmed(study: Study, stage: str, server: Path, how: str, share: float, place: Place) -> Verdict:
    at = 1 + int(share * _counted(study, stage, server, place))
    remote = Remote(server, f"{study.toml.stem}-{stage}-{at}-{how}-{os.getpid()}", place)
    try:
        remote.fill(study.before(stage))
        first = remote.run(study.argv(stage, remote.url), how, at)
        if bad := refused(first):
            return Verdict(bad.outcome, f"{how} at {remote.requests()[at - 1 : at]}: {bad.detail}")
        if len(remote.requests()) < at:
            return Verdict("harmless", "never reached")
        what = f"{how} at {remote.requests()[at - 1]}"
        if false := claims(remote.read(), study.reference(stage)):
            return Verdict("false-done", f"{what}: {false[0]}")
        again = remote.run(study.argv(stage, remote.url))
        verdict = judged(again, remote.read(), study.reference(stage))
        return Verdict(verdict.outcome, f"{what}: {verdict.detail}")
    finally:
        remote.remove()


def _counted(study: Study, stage: str, server: Path, place: Place) -> int:
    """The number of requests of an undisturbed run."""
    note = study.toml.parent / f"requests-{stage}"
    if not note.exists():
        remote = Remote(server, f"counting-{study.toml.stem}-{stage}-{os.getpid()}", place)
        remote.fill(study.before(stage))
        ended = remote.run(study.argv(stage, remote.url))
        assert ended.code == 0, ended.output
        note.write_text(str(len(remote.requests())))
        remote.remove()
    return int(note.read_text())


class Remote:
    """A workspace of one case at the server. Everything that talks to it is a fork: its client has threads."""

    def __init__(self, server: Path, case: str, place: Place):
        self.server, self.case, self.place = server, case, place
        self.url = f"s3://bucket/{case}"

    def fill(self, source: Path) -> None:
        """Copy a workspace there."""

        def copy() -> None:
            from pipeline.artefacts.storage import open_storage

            storage = open_storage(self.url)
            for path in (path for path in source.rglob("*") if path.is_file()):
                storage.write(path.relative_to(source).as_posix(), path.read_bytes())

        self._undisturbed(copy)

    def read(self) -> Path:
        """A copy of what is there."""
        target = self.place.folder / "found"
        shutil.rmtree(target, ignore_errors=True)

        def copy() -> None:
            from pipeline.artefacts.storage import open_storage

            storage = open_storage(self.url)
            for name in storage.sizes():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes(storage.read(name))

        target.mkdir()
        self._undisturbed(copy)
        return target

    def remove(self) -> None:
        """Free the server's memory."""

        def remove() -> None:
            from pipeline.artefacts.storage import open_storage

            storage = open_storage(self.url)
            for name in storage.sizes():
                storage.delete(name)

        self._undisturbed(remove)
        for path in self.server.glob(f"{self.case}*.*"):
            path.unlink()

    def run(self, argv: tuple[str, ...], how: str = "", at: int = 0) -> Ended:
        """A command, with a fault at one of its requests."""
        fault = {"how": how, "at": at} if how else None
        return self.start(argv, "", fault=fault, case=f"{self.case}-again" if self.requests() else self.case).wait(3 * LIMIT)

    def start(
        self,
        argv: tuple[str, ...],
        machine: str,
        *,
        fault: Mapping[str, object] | None = None,
        case: str = "",
        before: Callable[[], object] = lambda: None,
    ) -> Child:
        """Start a command on a machine, which is a cache folder of its own, with a fault at one of its requests."""
        case = case or f"{self.case}-{machine}"
        if fault:
            (self.server / f"{case}.json").write_text(json.dumps(fault))

        def prepare() -> None:
            self._account(case, machine)
            before()

        return start(command(*argv, before=prepare), self.place.folder)

    def locks(self) -> list[str]:
        """Locks that were not given back."""
        found = self.place.folder / "found" / ".locks"
        return [path.relative_to(found).as_posix() for path in found.rglob("*") if path.is_file()]

    def requests(self) -> list[str]:
        """The requests of the first command."""
        log = self.server / f"{self.case}.log"
        return log.read_text().splitlines() if log.exists() else []

    def _undisturbed(self, function: Callable[[], None]) -> None:
        def call() -> None:
            self._account(f"{self.case}-copying")
            function()

        ended = run(call, self.place.folder, 3 * LIMIT)
        assert ended.code == 0, ended.output

    def _account(self, case: str, machine: str = "") -> None:
        os.environ.update(
            AWS_ENDPOINT_URL=f"http://127.0.0.1:{(self.server / 'port').read_text()}/{case}",
            AWS_ACCESS_KEY_ID="somebody",
            AWS_SECRET_ACCESS_KEY="none",
            AWS_REGION="us-east-1",
            AWS_ALLOW_HTTP="true",
            XDG_CACHE_HOME=str(self.place.folder / f"cache{machine}"),
        )
