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
from pipeline.report.page import write_report
from pipeline.report.terminal import results_table


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


def test_a_store_that_massive_rows_rule_is_named_on_the_page_and_in_the_terminal(study: Study, tmp_path: Path) -> None:
    workspace = Workspace(shutil.copytree(study.workspace.root, tmp_path / "workspace"))
    store = workspace.folder(study.plan.store) / "manifest.json"
    record = json.loads(store.read_text())
    layer = next(iter(record["facts"]["norms"]))
    record["facts"]["norms"][layer] |= {"massive": 12, "massive_share": 0.93}
    store.write_text(json.dumps(sealed(record)))
    results = collect(study.plan, workspace)
    (remark,) = results.store.remarks
    assert remark.startswith(f"layer {layer}: 12 of ")
    assert remark.endswith("leave them out with store.max_norm = 10")
    assert remark in str(results_table(results).caption)
    write_report(results, tmp_path / "report")
    assert f"Massive rows.</strong> L{remark[1:]}." in (tmp_path / "report" / "index.html").read_text()
    assert not collect(study.plan, study.workspace).store.remarks
