"""When automations.yaml takes a run for lost: Prefect's own evaluation of its trigger, on events at times of our choice."""

import asyncio
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.events import AutomationCore
from prefect.server.events import triggers
from prefect.server.events.schemas.events import ReceivedEvent

from orchestration import alive
from orchestration.alive import ALIVE

ROOT = Path(__file__).parents[2]
START = datetime.now(UTC) + timedelta(days=1)  # ahead of the server, which evaluates the trigger, too


@pytest.fixture(scope="module")
def automation(temporary_server: None) -> Iterator[None]:
    """The automation, in the database and loaded."""
    (declared,) = yaml.safe_load((ROOT / "automations.yaml").read_text(encoding="utf-8"))["automations"]
    with get_client(sync_client=True) as client:
        created = client.create_automation(AutomationCore.model_validate(declared))
    yield
    with get_client(sync_client=True) as client:
        client.delete_automation(created)
    triggers.clear_loaded_automations()


STARTS, ENDS, SIGN, HEARTBEAT = "prefect.flow-run.Running", "prefect.flow-run.Completed", ALIVE, "prefect.flow-run.heartbeat"

pytestmark = pytest.mark.usefixtures("automation")


def lost_at(monkeypatch: pytest.MonkeyPatch, *happened: tuple[float, str]) -> list[int]:
    """After how many seconds a run with these events is taken for lost; they arrive in the order given.

    Each is its seconds after the start of the run, and its name.
    """
    run, fired = uuid4(), list[int]()

    async def act(firing: Any) -> None:
        assert firing.triggering_labels == {"prefect.resource.id": f"prefect.flow-run.{run}"}
        fired.append(second)

    monkeypatch.setattr(triggers, "act", act)

    async def evaluated(until: float) -> None:
        nonlocal second
        while second < until:
            second += 10
            for trigger in list(triggers.triggers.values()):
                await triggers.proactive_evaluation(trigger, START + timedelta(seconds=second))

    async def all_of_it() -> None:
        await triggers.reconcile_automations(force=True)
        for seconds, name in happened:
            await evaluated(seconds)
            event = ReceivedEvent(
                event=name,
                resource={"prefect.resource.id": f"prefect.flow-run.{run}"},
                occurred=START + timedelta(seconds=seconds),
                id=uuid4(),
            )
            await triggers.reactive_evaluation(event)
        await evaluated(happened[-1][0] + 120)

    second = 0
    asyncio.run(all_of_it())
    return fired


def test_a_run_that_ends_is_never_taken_for_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [f"prefect.flow-run.{name}" for name in ("Completed", "Cached", "Failed", "Crashed", "Cancelled")]
    for end in ends:
        assert lost_at(monkeypatch, (0, STARTS), (0, HEARTBEAT), (30, SIGN), (60, SIGN), (70, end)) == []


def test_a_process_that_exits_late_is_not_taken_for_a_lost_run(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lost_at(monkeypatch, (0, STARTS), (0, HEARTBEAT), (30, SIGN), (30, HEARTBEAT), (40, ENDS), (60, HEARTBEAT)) == []


def test_a_run_that_ends_before_its_first_heartbeat_arrives_is_not_taken_for_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lost_at(monkeypatch, (0, STARTS), (0.3, "prefect.flow-run.Cached"), (0.1, HEARTBEAT)) == []


def test_a_run_that_works_for_long_is_not_taken_for_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    signs = [(30.0 * number, SIGN) for number in range(1, 7)]
    assert lost_at(monkeypatch, (0, STARTS), *signs, (200, ENDS)) == []


def test_a_run_that_falls_silent_is_lost_after_ninety_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lost_at(monkeypatch, (0, STARTS), (0, HEARTBEAT)) == [90]
    assert lost_at(monkeypatch, (0, STARTS), (30, SIGN), (60, SIGN)) == [150]
    assert lost_at(monkeypatch, (0, "prefect.flow-run.Retrying")) == [90]


def test_a_deployed_run_gives_signs_of_life_until_it_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    given, twice = list[dict[str, str]](), threading.Event()

    def emit_event(event: str, resource: dict[str, str]) -> None:
        assert event == ALIVE
        given.append(resource)
        if len(given) == 2:
            twice.set()

    monkeypatch.setattr(alive, "emit_event", emit_event)
    monkeypatch.setattr(alive, "SECONDS_BETWEEN_SIGNS", 0.01)
    with alive.alive():
        time.sleep(0.1)
    assert given == []  # nobody watches a run without a deployment
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", str(uuid4()))
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__ID", run := str(uuid4()))
    with alive.alive():
        assert twice.wait(60)
    number = len(given)
    time.sleep(0.1)
    assert len(given) == number
    assert {resource["prefect.resource.id"] for resource in given} == {f"prefect.flow-run.{run}"}
