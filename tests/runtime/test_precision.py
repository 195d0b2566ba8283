"""Which precision is faster is measured, and told only where the experiment asks for the slower one."""

import pytest
import torch

from pipeline.runtime import precision
from pipeline.runtime.precision import slower_choice

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("chosen", "times", "says"),
    [
        ("float32", (34.0, 21.0), "a matrix product takes 34 ms, and in bfloat16 21 ms"),
        ("bfloat16", (44.0, 29.0), "a matrix product takes 44 ms, and in float32 29 ms"),
        ("float32", (21.0, 20.5), None),
        ("float32", (21.0, 34.0), None),
    ],
)
def test_the_slower_one_is_named(
    chosen: str, times: tuple[float, float], says: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(precision, "_milliseconds", lambda dtypes, *_: asked.append(dtypes) or list(times))
    expected = says and f'train.precision "{chosen}" is the slower one here: {says}'
    assert slower_choice(chosen, 512, 256, 2048, CPU) == expected
    assert asked[0][0] == chosen


def test_both_are_really_measured() -> None:
    assert all(0 < taken < 1e5 for taken in precision._milliseconds(("float32", "bfloat16"), 64, 64, 64, CPU))


def test_a_small_study_is_not_kept_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_milliseconds", lambda *_: pytest.fail("measured"))
    assert slower_choice("float32", 64, 64, 64, CPU) is None
