"""Where tasks run: what is refused before any of them does."""

import pytest
import torch

from orchestration.engine import Local, engine
from pipeline.errors import BadInputError
from pipeline.study.sections import RunConfig


def test_workers_that_a_flow_starts_never_share_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BadInputError, match=r"run.workers 2: .* would share one GPU; set run.workers to 1"):
        engine(RunConfig(engine="dask", workers=2)).__enter__()
    with engine(RunConfig(workers=2)) as local:
        assert isinstance(local, Local)
