"""Results are collected from artefacts that are whole; what cannot be understood is one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from small_study import Study

from pipeline.artefacts.identity import sealed, sha256
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import CorruptArtefactError
from pipeline.report.collect import collect


def forge(folder: Path, name: str, **values: Any) -> None:
    """Change a file, and what vouches for it."""
    path, manifest = folder / name, folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    record = json.loads(manifest.read_text())
    record["files"][name] = {"bytes": path.stat().st_size, "sha256": sha256(path.read_bytes())}
    manifest.write_text(json.dumps(sealed(record)))


@pytest.mark.parametrize(
    ("name", "values"),
    [("reconstruction.json", {"fvu": []}), ("examples.json", {"latents": 7}), ("loss.json", {"recovered": None})],
)
def test_an_evaluation_that_means_nothing_is_one_line(study: Study, tmp_path: Path, name: str, values: Any) -> None:
    workspace = Workspace(shutil.copytree(study.workspace.root, tmp_path / "workspace"))
    folder = workspace.folder(study.plan.saes[0].evaluation)
    forge(folder, name, **values)
    with pytest.raises(CorruptArtefactError) as refused:
        collect(study.plan, workspace)
    assert str(refused.value).startswith(f"{folder} cannot be understood (")
    assert "\n" not in str(refused.value)


def test_an_sae_without_its_facts_is_one_line(study: Study, tmp_path: Path) -> None:
    workspace = Workspace(shutil.copytree(study.workspace.root, tmp_path / "workspace"))
    manifest = workspace.folder(study.plan.saes[0].artefact) / "manifest.json"
    evaluation = workspace.folder(study.plan.saes[0].evaluation) / "manifest.json"
    record = json.loads(manifest.read_text())
    del record["facts"]["tokens"]
    manifest.write_text(json.dumps(sealed(record)))
    evaluated = json.loads(evaluation.read_text())
    evaluated["parents"][study.plan.saes[0].artefact.path] = sha256(manifest.read_bytes())
    evaluation.write_text(json.dumps(sealed(evaluated)))
    with pytest.raises(CorruptArtefactError, match=r"cannot be understood \('tokens'\)"):
        collect(study.plan, workspace)
