"""Tells the server that a deployed run is alive, by which automations.yaml knows a lost run.

Prefect's own heartbeats do not serve. They reach the server by another way than the states of a run: the first one of a
short run may arrive after its end, and one may be sent while the end is recorded. A finished run would then look lost.
"""

import threading
from collections.abc import Generator
from contextlib import contextmanager
from contextvars import copy_context

from prefect.events import emit_event
from prefect.runtime import deployment, flow_run

ALIVE = "dasae.run.alive"
SECONDS_BETWEEN_SIGNS = 30.0


@contextmanager
def alive() -> Generator[None]:
    """Emit ALIVE every half minute, the first after that time, and none once the block is left.

    A run of no deployment emits none: whoever called the flow sees it end.
    """
    if deployment.id is None:
        yield
        return
    resource = {"prefect.resource.id": f"prefect.flow-run.{flow_run.id}", "prefect.resource.name": str(flow_run.name)}
    left = threading.Event()

    def signs() -> None:
        while not left.wait(SECONDS_BETWEEN_SIGNS):
            emit_event(ALIVE, resource=resource)

    # In a copy of the context, without which Prefect would start a server of its own for the events.
    thread = threading.Thread(target=copy_context().run, args=(signs,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()
        thread.join()
