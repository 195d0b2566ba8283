"""Which device is taken, and what is said of one that is not there."""

import pytest
import torch

from pipeline.errors import BadInputError
from pipeline.runtime.devices import VARIABLE, best_device, block_rows, sae_device


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with two CUDA devices and Apple's MPS."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    return monkeypatch


def test_the_best_device_is_taken_unless_another_is_asked_for(machine: pytest.MonkeyPatch) -> None:
    assert best_device() == sae_device() == torch.device("cuda")
    assert best_device("cuda:1") == torch.device("cuda", 1)
    machine.setenv(VARIABLE, "cpu")
    assert best_device("cuda:1") == sae_device("cuda:1") == torch.device("cpu")


def test_training_takes_mps_only_when_asked_for(machine: pytest.MonkeyPatch) -> None:
    machine.setattr(torch.cuda, "is_available", lambda: False)
    assert (best_device().type, sae_device().type) == ("mps", "cpu")
    assert sae_device("mps").type == "mps"


@pytest.mark.parametrize(
    ("asked", "variable", "says"),
    [
        ("cuda:2", None, "run.device: there is no cuda:2; torch .* finds 2 CUDA devices here"),
        ("auto", "gpu", "DASAE_DEVICE: 'gpu' is no device; name auto, cpu, mps, cuda or cuda:0"),
        ("auto", "cuda:7", "DASAE_DEVICE: there is no cuda:7"),
    ],
)
def test_a_device_that_is_not_there_is_refused(
    machine: pytest.MonkeyPatch, asked: str, variable: str | None, says: str
) -> None:
    if variable:
        machine.setenv(VARIABLE, variable)
    with pytest.raises(BadInputError, match=says):
        best_device(asked)


def test_a_panel_is_all_of_a_usual_sae_and_never_nothing() -> None:
    assert block_rows(16_384) == 16_384
    assert block_rows(65_536) == 4_096
    assert block_rows(10**12) == 1
