"""What compiles and records functions, on a machine that can do neither."""

import pytest
import torch

from pipeline.runtime import compiled
from pipeline.runtime.compiled import Replayed, can_compile

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def test_where_nothing_can_be_compiled_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_compiler(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")

    monkeypatch.setattr(torch, "compile", no_compiler)
    can_compile.cache_clear()
    assert not can_compile()
    assert not can_compile()
    can_compile.cache_clear()
    assert capsys.readouterr().err == "steps on the GPU are not compiled, and slower for it: Failed to find C compiler.\n"


def test_running_out_of_memory_is_no_reason_not_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(torch, "compile", full)
    can_compile.cache_clear()
    with pytest.raises(torch.OutOfMemoryError):
        can_compile()


def test_a_function_is_recorded_once_after_some_plain_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def recorded(_: object) -> object:
        done.append("recorded")
        return lambda: done.append("replayed")

    monkeypatch.setattr(compiled, "recorded", recorded)
    replayed = Replayed()
    for _ in range(5):
        replayed(lambda: done.append("plain"), CUDA)
    assert done == ["plain", "plain", "plain", "recorded", "replayed", "replayed"]
    done.clear()
    plain = Replayed()
    for _ in range(5):
        plain(lambda: done.append("plain"), CPU)
    assert done == ["plain"] * 5
