"""prefect.yaml's queue `gpu`: studies that share one GPU run in turn."""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.states import Completed, Pending, Running, Scheduled

ROOT = Path(__file__).parents[2]
DEPLOYMENTS = yaml.safe_load((ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]


def test_every_study_for_a_gpu_is_in_its_queue_and_no_other() -> None:
    queues = {one["name"]: one["work_pool"].get("work_queue_name") for one in DEPLOYMENTS}
    assert {name for name, queue in queues.items() if queue == "gpu"} == {
        one["name"] for one in DEPLOYMENTS if "gpu" in one["tags"]
    }
    assert {one["work_pool"]["name"] for one in DEPLOYMENTS} == {"local"}


@pytest.fixture
def client(temporary_server: None) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client


def deployed(client: SyncPrefectClient, flow: UUID, declared: dict[str, Any]) -> UUID:
    """A deployment in the pool and queue that prefect.yaml says."""
    pool = declared["work_pool"]
    return client.create_deployment(
        flow, declared["name"], work_pool_name=pool["name"], work_queue_name=pool.get("work_queue_name")
    )


def test_two_studies_take_turns_on_the_gpu_and_others_do_not_wait(client: SyncPrefectClient) -> None:
    def offered() -> list[UUID]:
        """The runs that a worker gets when it asks."""
        found = client.request(
            "POST", "/work_pools/{name}/get_scheduled_flow_runs", path_params={"name": "local"}, json={}
        ).json()
        return [UUID(one["flow_run"]["id"]) for one in found]

    client.create_work_pool(WorkPoolCreate(name="local", type="process"))
    flow = client.create_flow_from_name("ablation")
    chosen = {name: next(one for one in DEPLOYMENTS if one["name"] == name) for name in ("gemma-2-2b", "gemma-2b", "demo")}
    first, second, small = (
        client.create_flow_run_from_deployment(
            deployed(client, flow, one), state=Scheduled(scheduled_time=datetime.now(UTC))
        ).id
        for one in chosen.values()
    )
    queue = client.request("GET", "/work_pools/local/queues/gpu").json()  # made by the deployments
    client.request("PATCH", "/work_pools/local/queues/gpu", json={"concurrency_limit": 1})
    assert queue["concurrency_limit"] is None
    assert set(offered()) == {first, small}
    for state in (Pending(), Running()):
        client.set_flow_run_state(first, state)
        assert set(offered()) == {small}
    client.set_flow_run_state(first, Completed())
    assert set(offered()) == {second, small}
