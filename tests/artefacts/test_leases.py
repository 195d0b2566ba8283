"""Locks between machines: who gets them, who loses them, and that two never publish different bytes."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from functools import partial
from itertools import combinations, islice, product
from pathlib import Path
from typing import Any

import pytest
from object_store import InMemory, account, serving

from pipeline.artefacts import leases
from pipeline.artefacts.leases import LASTS, Leases, fenced
from pipeline.artefacts.locks import Locks
from pipeline.artefacts.manifest import MANIFEST, RESERVED, Artefact
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import StorageError

SAE = Artefact(kind="saes", label="full-s0", inputs={"seed": 0})


class Clock:
    """A clock that only the test moves. It is that of every machine."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(leases, "time", clock)
    # Whoever holds a lock is asleep until a test says otherwise.
    monkeypatch.setattr(Leases, "_keep_renewing", lambda _: None)
    return clock


def machine(objects: InMemory, folder: Path) -> Leases:
    storage: Any = objects
    return Leases(storage, Locks(folder, within=folder))


def test_a_lock_is_one_machines_and_is_given_back(tmp_path: Path, clock: Clock) -> None:
    objects = InMemory()
    here, there = machine(objects, tmp_path / "here"), machine(objects, tmp_path / "there")
    with here.held("a"):
        with there.attempted("a") as second, there.attempted("b") as other:
            assert (second, other) == (False, True)
        here.assure("a")
    assert objects.objects == {}
    with there.attempted("a") as second:
        assert second


def test_parts_are_claimed_one_by_one_and_none_while_one_machine_has_all(tmp_path: Path, clock: Clock) -> None:
    objects = InMemory()
    here, there = machine(objects, tmp_path / "here"), machine(objects, tmp_path / "there")
    with here.claimed("a", "1") as first, there.claimed("a", "1") as same, there.claimed("a", "2") as another:
        assert (first, same, another) == (True, False, True)
        here.assure("a", "1")
        with machine(objects, tmp_path / "third").alone("a") as alone:
            assert not alone
    with here.alone("a") as alone, there.claimed("a", "1") as claimed:
        assert (alone, claimed) == (True, False)
    assert objects.objects == {}


def test_a_silent_holder_is_replaced_and_told(tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    objects = InMemory()
    here, there = machine(objects, tmp_path / "here"), machine(objects, tmp_path / "there")
    with here.held("a"):
        clock.now += LASTS - 1
        here.assure("a")  # renewed
        with there.held("a"):
            assert clock.now == pytest.approx(1000 + 2 * LASTS - 1, abs=3)
            with pytest.raises(StorageError, match="did nothing for 120 seconds, and another machine took over its work"):
                here.assure("a")
            there.assure("a")
    assert f"waiting for process {os.getpid()} on " in capsys.readouterr().err
    assert objects.objects == {}


def test_a_late_holder_removes_nothing_of_the_next(tmp_path: Path, clock: Clock) -> None:
    objects = InMemory()
    here, there = machine(objects, tmp_path / "here"), machine(objects, tmp_path / "there")
    with ExitStack() as second:
        with here.held("a"):
            second.enter_context(there.held("a"))
        there.assure("a")
        with here.attempted("a") as again:
            assert not again


def test_a_renewal_whose_answer_was_lost_is_ones_own(tmp_path: Path, clock: Clock) -> None:
    objects = InMemory()
    here = machine(objects, tmp_path / "here")
    with here.held("a"):
        objects.lost = True
        with pytest.raises(StorageError, match="lost"):
            here.assure("a")
        here.assure("a")


def publishing(storage: Any, number: int, assure: Callable[[], None]) -> Iterator[None]:
    """What a machine does to publish, if nobody has: two files, each at any time after the step before."""
    there = storage.look("manifest")
    if there is None or there.content.startswith(RESERVED):
        put = fenced(storage, "manifest", ["weights"], assure)
        for name in ("weights", "manifest"):
            yield
            put(name, f"{name} of {number}".encode())


STEPS = 5
"""Steps of a machine: it takes the lock, reserves the record, writes a file, writes the record, gives the lock back."""


def interleavings(first: int, second: int) -> Iterator[tuple[int, ...]]:
    """All orders of so many steps of machine 0 and so many of machine 1."""
    for places in combinations(range(first + second), first):
        yield tuple(0 if at in places else 1 for at in range(first + second))


def outcome(folder: Path, order: tuple[int, ...], lost: int | None) -> dict[str, bytes]:
    """What is published when two machines take steps in an order, asleep in between, and the answer to one step is lost."""
    objects, clock = InMemory(), Clock()
    machines = [machine(objects, folder / str(number)) for number in range(2)]
    with pytest.MonkeyPatch.context() as patch, ExitStack() as everything:
        patch.setattr(leases, "time", clock)
        patch.setattr(Leases, "_keep_renewing", lambda _: None)

        def work(number: int) -> Iterator[None]:
            with everything.enter_context(ExitStack()) as stack:
                stack.enter_context(machines[number].held("a"))  # waits until a sleeper's lock is nobody's
                yield
                yield from publishing(objects, number, partial(machines[number].assure, "a"))
                yield

        both = [work(0), work(1)]
        for at, number in enumerate(order):
            objects.lost = at == lost
            with suppress(StorageError):
                next(both[number], None)
            objects.lost = False
    return {name: there.content for name, there in objects.objects.items() if name in ("weights", "manifest")}


def test_no_two_machines_ever_publish_different_bytes(tmp_path: Path) -> None:
    """In any order of their steps, each killed after any of them, or with any answer lost."""
    cases = [(order, None) for ends in product(range(STEPS + 1), repeat=2) for order in interleavings(*ends)]
    cases += [(order, lost) for order in islice(interleavings(STEPS, STEPS), 0, None, 5) for lost in range(2 * STEPS)]
    published = 0
    for order, lost in cases:
        found = outcome(tmp_path, order, lost)
        if not found.get("manifest", RESERVED).startswith(RESERVED):
            published += 1
            assert found["weights"].split()[-1] == found["manifest"].split()[-1], (order, lost)
    assert published > len(cases) / 3


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with serving() as url:
        yield url


@pytest.fixture
def two(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[Workspace]:
    """The same workspace, as two machines see it."""
    found: list[Workspace] = []
    for name in ("here", "there"):
        for variable, value in account(server, tmp_path / name).items():
            monkeypatch.setenv(variable, value)
        found.append(Workspace(f"s3://bucket/{request.node.name}"))
    return found


def test_a_machine_that_slept_publishes_nothing(two: list[Workspace], clock: Clock) -> None:
    here, there = two
    with here.lock(SAE) as folder:
        (folder / "weights").write_bytes(b"of here")
        with there.lock(SAE) as other:
            (other / "weights").write_bytes(b"of there")
            there.publish(SAE)
        with pytest.raises(StorageError, match="another machine took over its work"):
            here.publish(SAE)
        with pytest.raises(StorageError, match="another machine took over its work"):
            here.keep(SAE)
    assert here.storage(SAE).read("weights") == b"of there"
    assert there.verified(SAE, "weights").read_bytes() == b"of there"


def test_what_was_written_in_between_is_not_replaced(two: list[Workspace], monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = two
    assure = Leases.assure

    def slowly(self: Leases, name: str, part: str | None = None) -> None:
        """The lock is still one's own, and then the machine sleeps and another one publishes."""
        assure(self, name, part)
        if self is here._locks:  # pyright: ignore[reportPrivateUsage]
            for file in ("weights", MANIFEST):
                there.storage(SAE).write(file, b"of there")

    monkeypatch.setattr(Leases, "assure", slowly)
    with here.lock(SAE) as folder:
        (folder / "weights").write_bytes(b"of here")
        with pytest.raises(
            StorageError, match=r"manifest\.json was written by another machine meanwhile; run the same command again"
        ):
            here.publish(SAE)
    assert [here.storage(SAE).read(file) for file in ("weights", MANIFEST)] == [b"of there", b"of there"]


def test_work_goes_on_at_another_machine(two: list[Workspace]) -> None:
    here, there = two
    with here.lock(SAE) as folder:
        (folder / "checkpoint").mkdir()
        for name, content in {"checkpoint/100.json": b"{}", "checkpoint/100.safetensors": b"100", "log": b"1\n"}.items():
            (folder / name).write_bytes(content)
        here.keep(SAE)
        (folder / "checkpoint" / "100.json").rename(folder / "checkpoint" / "200.json")
        here.keep(SAE)
        here.restore(SAE)  # its own folder is as far
        (folder / "log").write_bytes(b"1\n2\n")
        here.restore(SAE)
    with there.lock(SAE) as other:
        there.restore(SAE)
        found = {path.relative_to(other).as_posix(): path.read_bytes() for path in other.rglob("*") if path.is_file()}
        assert found == {"checkpoint/200.json": b"{}", "checkpoint/100.safetensors": b"100", "log": b"1\n"}
        there.keep(SAE)
        (other / "weights").write_bytes(b"done")
        there.publish(SAE, files=["weights"])
    assert set(there.storage(SAE).sizes()) == {"weights", MANIFEST}
    assert (folder / "log").read_bytes() == b"1\n2\n"


def test_the_lock_of_a_killed_process_is_free_at_once_on_its_machine(two: list[Workspace], tmp_path: Path) -> None:
    here, there = two
    code = (
        "import os, sys\nfrom pipeline.artefacts.manifest import Artefact\n"
        "from pipeline.artefacts.workspace import Workspace\n"
        "artefact = Artefact(kind='saes', label='full-s0', inputs={'seed': 0})\n"
        "with Workspace(sys.argv[1]).lock(artefact):\n    os._exit(9)\n"
    )
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "here")}
    killed = subprocess.run([sys.executable, "-c", code, str(here.root)], env=environment, check=False)
    assert killed.returncode == 9
    assert there.is_locked(SAE.path)
    began = time.monotonic()
    with here.lock(SAE):
        assert time.monotonic() - began < LASTS
    assert not there.is_locked(SAE.path)
