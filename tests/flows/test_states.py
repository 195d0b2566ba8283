"""Which errors of a stage Prefect tries again."""

from typing import Any

import pytest
from prefect.states import State, StateType
from safetensors import SafetensorError

from orchestration.states import may_pass
from pipeline.errors import PipelineError, StorageError

FULL = "Error while serializing: I/O error: No space left on device (os error 28)"


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (SafetensorError(FULL), True),
        (SafetensorError("Error while deserializing header: InvalidHeader"), False),
        (StorageError("full"), True),
        (OSError(5, "Input/output error"), True),
        (PermissionError(13, "denied"), False),
        (PipelineError("wrong"), False),
    ],
)
def test_io_trouble_is_tried_again_whoever_reports_it(error: Exception, again: bool) -> None:
    nothing: Any = None
    assert may_pass(nothing, nothing, State[Any](type=StateType.FAILED, data=error)) is again
