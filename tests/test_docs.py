"""The pages that are examples: their blocks are run as they stand, in order."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_study import Study

from pipeline.cli import _report
from pipeline.plan import make_plan
from pipeline.workspace import Workspace

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def own(study: Study, tmp_path: Path) -> Workspace:
    """A copy of the small study's workspace, to be changed."""
    return Workspace(shutil.copytree(study.workspace.root, tmp_path / "workspace"))


def test_the_quickstart_runs(study: Study, own: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    _report(make_plan(study.experiment), str(own.root))
    capsys.readouterr()
    names: dict[str, Any] = {}
    for block in blocks("quickstart.md", "python"):
        code = block.replace('"demo"', repr(study.experiment.argument)).replace('"workspace"', repr(str(own.root)))
        exec(compile(code, "quickstart.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "20,000 rows of 64 numbers after layers (1, 2)" in printed
    assert printed.count("latents fire, most of all") == len(names["read"].tokens) > 3
    assert names["x_BD"].shape == (512, 64)
    assert names["x_BD"].square().sum(dim=1).mean() == pytest.approx(1, rel=0.1)
    assert names["f_RF"].shape == (len(names["read"].tokens), 96)
    assert 0 < names["error"] < 1
    assert list(names["results"]["arm"]) == ["baseline", "full", "magnitude"]
    assert set(names["planned"]["reference"]) == {"full"}
