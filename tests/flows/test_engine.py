"""Where tasks run: what is refused before any of them does, and what each worker is given."""

from pathlib import Path

import pytest
import torch
from prefect.settings import PREFECT_API_URL, temporary_settings

import flows
from orchestration.engine import Local, engine, workers_here
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError
from pipeline.runtime.devices import cards_for
from pipeline.runtime.memory import free_memory
from pipeline.study.sections import RunConfig


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("DASAE_DEVICE", raising=False)


@pytest.mark.usefixtures("two_cards")
def test_workers_that_a_flow_starts_never_share_a_gpu() -> None:
    with pytest.raises(BadInputError, match=r"run.workers 3: .* a GPU each, and cuda offers 2; lower run.workers"):
        engine(RunConfig(engine="dask", workers=3)).__enter__()
    with pytest.raises(BadInputError, match="and cuda:1 offers 2"):
        engine(RunConfig(engine="dask", workers=2, device="cuda:1")).__enter__()
    with engine(RunConfig(workers=2)) as local:
        assert isinstance(local, Local)


@pytest.mark.usefixtures("two_cards")
def test_each_worker_has_a_gpu_of_those_that_this_process_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cards_for(2) == ["0", "1"]
    assert cards_for(1, "cuda:1") == []  # it sees all, and takes that one
    assert cards_for(2, "cpu") == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-3a")
    assert cards_for(2) == ["5", "GPU-3a"]
    seen = [worker["options"]["env"]["CUDA_VISIBLE_DEVICES"] for worker in workers_here(2, cards_for(2)).values()]
    assert seen == ["5", "GPU-3a"]


def test_workers_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed.system import MEMORY_LIMIT

    workers = workers_here(4, [])
    assert [worker["options"]["memory_limit"] for worker in workers.values()] == [MEMORY_LIMIT // 4] * 4
    for name, value in workers[0]["options"]["env"].items():
        monkeypatch.setenv(name, value)
    assert 0 < free_memory(torch.device("cpu")) < MEMORY_LIMIT // 4
    monkeypatch.setenv("DASAE_MEMORY", "1000")
    assert free_memory(torch.device("cpu")) == 0
    monkeypatch.setenv("DASAE_MEMORY", "8GB")
    with pytest.raises(BadInputError, match="DASAE_MEMORY='8GB': give a number of bytes"):
        free_memory(torch.device("cpu"))


def test_workers_know_the_temporary_server_and_start_none_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Server:
        api_url = "http://127.0.0.1:8123/api"

        def __enter__(self) -> "Server":
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr("prefect.server.api.server.SubprocessASGIServer", Server)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    with temporary_settings({PREFECT_API_URL: None}), flows._server(Workspace(tmp_path)):  # pyright: ignore[reportPrivateUsage]
        assert PREFECT_API_URL.value() == Server.api_url  # settings go with every task
