"""`dasae workspace check` and `clean`: what belongs to nobody is shown, and only that is removed."""

import shutil
from pathlib import Path

import pytest
from small_study import Study
from typer.testing import CliRunner

from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.workspace import Workspace
from pipeline.cli import app
from pipeline.study.litter import What, litter, remove


@pytest.fixture
def littered(study: Study, tmp_path: Path) -> Workspace:
    """The finished study with one piece of every kind of litter."""
    workspace = Workspace(shutil.copytree(study.workspace.local, tmp_path / "ws"))
    sae = workspace.folder(study.plan.saes[0].artefact)
    (sae / "checkpoint").mkdir()
    (sae / "checkpoint" / "000000018.json").write_text("{}")
    (sae / ".cfg.json.0123.partial").write_text("half")
    (sae / "gone").symlink_to(tmp_path / "nowhere")
    (workspace.local / ".locks").mkdir(exist_ok=True)
    (workspace.local / ".locks" / "saes-of-a-killed-process").touch()
    other = Artefact(kind="saes", label="other", inputs={"of": "nobody"})
    with workspace.lock(other) as folder:
        (folder / "cfg.json").write_text("{}")
        workspace.publish(other)
    return workspace


def files(workspace: Workspace) -> set[str]:
    return {path.relative_to(workspace.local).as_posix() for path in workspace.local.rglob("*") if path.name != ".locks"}


def test_litter_is_found_by_kind_and_a_finished_study_has_none(study: Study, littered: Workspace) -> None:
    assert litter(study.workspace, [study.plan]) == []
    sae, found = study.plan.saes[0].artefact.path, litter(littered, [study.plan])
    assert {(one.what, one.path.removeprefix(f"{sae}/")) for one in found if not one.path.startswith("saes/other")} == {
        (What.leftover, "checkpoint"),
        (What.leftover, ".cfg.json.0123.partial"),
        (What.leftover, ".locks/saes-of-a-killed-process"),
        (What.broken_link, "gone"),
    }
    (orphan,) = [one for one in found if one.what == What.orphan]
    assert orphan.path.startswith("saes/other-")
    assert orphan.bytes > 2


def test_only_litter_is_removed_and_orphans_on_request(study: Study, littered: Workspace) -> None:
    before = {path.relative_to(study.workspace.local).as_posix() for path in study.workspace.local.rglob("*")} - {".locks"}
    arguments = ["workspace", "clean", "--experiment", study.experiment.argument, "--workspace", str(littered.root)]
    refused = CliRunner().invoke(app, arguments, input="n\n")
    assert (refused.exit_code, "remove 4 of these?" in refused.output) == (0, True)
    assert CliRunner().invoke(app, [*arguments, "--yes"]).output.endswith("4 removed, 0 in use\n")
    assert {name for name in files(littered) if not name.startswith("saes/other-")} == before
    assert CliRunner().invoke(app, [*arguments, "--orphans"], input="y\n").exit_code == 0
    assert files(littered) == before
    done = CliRunner().invoke(app, ["workspace", "check", *arguments[2:]])
    assert (done.exit_code, f"0 in {littered.root} belong to nobody" in done.output) == (0, True)


def test_what_a_process_works_on_is_no_litter(study: Study, littered: Workspace) -> None:
    (orphan,) = [one for one in litter(littered, [study.plan]) if one.what == What.orphan]
    other = Artefact(kind="saes", label="other", inputs={"of": "nobody"})
    with littered.lock(other):
        assert orphan not in litter(littered, [study.plan])
        assert list(remove(littered, [orphan])) == []
    assert list(remove(littered, [orphan])) == [orphan]
