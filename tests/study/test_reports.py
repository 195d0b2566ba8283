"""What a report follows from: it is written again when one of these changes."""

from pathlib import Path

import pytest
from small_study import Study

from pipeline.artefacts.workspace import Workspace
from pipeline.study.experiment import Experiment
from pipeline.study.plan import make_plan
from pipeline.study.reports import is_current, made_of, publish_report
from pipeline.study.status import Status

OWN = """
[arms.mine]
question = "And with more sparsity?"
l1 = 0.05
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("A study small enough for a test.", "Another one."),
        ("And with more sparsity?", "And if fewer latents fire?"),
        ("l1 = 0.05", 'l1 = 0.05\nfrom = "magnitude"\ncontrast.by = "direction"'),  # the same recipe, compared with another
    ],
)
def test_other_words_or_arms_are_another_report(study: Study, small_toml: Path, old: str, new: str) -> None:
    small_toml.write_text(small_toml.read_text().replace('"full", "magnitude"', '"full", "mine"') + OWN)
    before = made_of(make_plan(Experiment.load(str(small_toml))), study.workspace)
    assert made_of(make_plan(Experiment.load(str(small_toml))), study.workspace) == before
    text = small_toml.read_text()
    assert old in text
    small_toml.write_text(text.replace(old, new))
    assert made_of(make_plan(Experiment.load(str(small_toml))), study.workspace) != before


@pytest.mark.parametrize("name", ["index.html", "results.csv", "manifest.json"])
@pytest.mark.parametrize("damage", ["removed", "changed"])
def test_a_report_with_a_damaged_file_is_not_current(study: Study, tmp_path: Path, name: str, damage: str) -> None:
    workspace = Workspace(tmp_path)
    place = workspace.report(study.experiment.name)
    partial = tmp_path / "reports" / study.experiment.name / ".index.html.1.partial"
    partial.parent.mkdir(parents=True)
    partial.write_text("of a killed run")
    publish_report(place, {"index.html": b"page", "results.csv": b"0.195"}, made_of(study.plan, workspace))
    assert not partial.exists()
    assert is_current(study.plan, workspace)
    if damage == "removed":
        place.delete(name)
    else:
        place.write(
            name, place.read(name).replace(b"page", b"pace").replace(b"0.195", b"0.002").replace(b"version", b"edition")
        )
    assert not is_current(study.plan, workspace)


def test_a_report_from_before_manifests_is_not_current(study: Study, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.report(study.experiment.name).write("index.html", b"page")
    assert not is_current(study.plan, workspace)


def test_status_waits_for_the_report_and_for_the_probed_model(study: Study, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    found = Status(study.plan, study.workspace)
    assert {artefact.path for artefact in study.plan.llm_probing.values()} <= set(found.found)
    workspace.report(study.experiment.name).write("index.html", b"page")
    found.workspace = workspace
    assert found.next_command().startswith(f"next: dasae report {study.experiment.argument} --workspace ")
