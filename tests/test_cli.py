"""The command as a user meets it: exit codes, one-line errors, and what it says."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from small_study import Study
from typer.testing import CliRunner

from pipeline.artefacts.workspace import Workspace
from pipeline.cli import app, main
from pipeline.study.plan import make_plan
from pipeline.study.status import Status

ROOT = Path(__file__).parents[1]


def dasae(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command line."""
    monkeypatch.setattr(sys, "argv", ["dasae", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def test_help_needs_none_of_the_heavy_libraries() -> None:
    check = "import sys, pipeline.cli; print([m for m in ('torch', 'transformers', 'zarr', 'prefect') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    shown = CliRunner().invoke(app, ["--help"])
    assert shown.exit_code == 0
    for command in ("ablate", "extract", "train", "evaluate", "report", "status", "export"):
        assert command in shown.output


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["dasae", "--debug", "train", "dmeo"])
    with pytest.raises(ValueError, match="no experiment 'dmeo'"):
        main()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        # 20M rows x (3 layers x 2304 x 2 bytes + 20 bytes of row fields)
        ("extract", ["20,000,000 rows in 611 shards, 276.9 GB", "about"]),
        ("ablate", ["276.9 GB", "predicted for one H100 and 16 cores, not measured", "train 117 SAEs"]),
    ],
)
def test_a_dry_run_estimates_the_gemma_study_and_makes_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, says: list[str]
) -> None:
    monkeypatch.chdir(ROOT)
    code, out, _ = dasae(monkeypatch, capsys, command, "gemma-2-2b", "--dry-run", "--workspace", str(tmp_path / "ws"))
    assert code == 0
    assert all(part in out for part in says)
    assert not (tmp_path / "ws").exists()


def test_a_plan_for_several_gpus_is_called_predicted_and_names_its_rates(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    code, out, _ = dasae(monkeypatch, capsys, "plan", "gemma-2-2b", "--workers", "64")
    assert code == 0
    assert "gemma-2-2b on 64 GPUs: predicted, not measured" in out
    assert all(part in out for part in ("tokenize", "757 TFLOP/s", "docs/performance.md", "more were not measured"))
    assert dasae(monkeypatch, capsys, "plan", "gemma-2-2b", "--workers", "0")[0] == 2


def shown(study: Study, workspace: Workspace) -> str:
    console = Console(width=160, file=io.StringIO())
    console.print(Status(study.plan, workspace).table())
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_status_goes_from_missing_to_done(study: Study, tmp_path: Path) -> None:
    empty = Workspace(tmp_path)
    assert "missing" in shown(study, empty)
    assert "done" not in shown(study, empty).replace("done  ", "", 1)
    assert Status(study.plan, empty).next_command().startswith(f"next: dasae extract {study.experiment.argument} ")
    finished = shown(study, study.workspace)
    assert "missing" not in finished
    assert "20,000 rows" in finished
    assert "full, layer 2" in finished
    assert (
        Status(study.plan, study.workspace)
        .next_command()
        .startswith(f"next: dasae report {study.experiment.argument} --workspace ")
    )


def test_status_knows_a_half_filled_store(study: Study, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "ws")
    shutil.copytree(study.workspace.root, workspace.root)
    folder = workspace.folder(study.plan.store)
    (folder / "manifest.json").unlink()
    (folder / "commits/000003.json").unlink()
    assert "4 of 5 shards" in shown(study, workspace)


def test_status_knows_training_that_has_begun(study: Study, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "ws")
    folder = workspace.folder(study.plan.saes[0].artefact)
    folder.mkdir(parents=True)
    (folder / "training.jsonl").write_text("{}")
    (line,) = [line for line in shown(study, workspace).splitlines() if "saes" in line and "baseline" in line]
    assert "partial" in line
    assert "0 of 1" in line


def test_a_part_of_the_study_is_trained_alone(study: Study, small_toml: Path) -> None:
    plan = make_plan(study.experiment, arms=["full"])
    assert [sae.artefact.key for sae in plan.saes] == [sae.artefact.key for sae in study.plan.saes if sae.arm == "full"]


def test_two_experiments_stand_side_by_side(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], study: Study, tmp_path: Path
) -> None:
    workspace = tmp_path / "workspace"
    shutil.copytree(study.workspace.root, workspace)
    other = tmp_path / "other.toml"
    other.write_text(Path(study.experiment.argument).read_text().replace('"full", "magnitude"]', '"full"]'))
    monkeypatch.setattr("pipeline.cli.console", Console(width=200))
    monkeypatch.setattr(
        sys, "argv", ["dasae", "report", study.experiment.argument, str(other), "--workspace", str(workspace)]
    )  # fmt: skip
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    page = (workspace / "reports" / "small-beside-other" / "index.html").read_text()
    assert "Both studies read the same activations" in page
    assert "Only in small: magnitude." in page


def test_brackets_in_a_path_are_no_markup(study: Study, tmp_path: Path) -> None:
    place = tmp_path / "runs [/x] [bold]"
    shutil.copytree(study.workspace.local, place)
    for arguments in (["status", study.experiment.argument], ["report", study.experiment.argument]):
        done = CliRunner().invoke(app, [*arguments, "--workspace", str(place)])
        assert done.exit_code == 0, done.output
        assert "[/x] [bold]" in done.output
    for command in ("info", "verify"):
        done = CliRunner().invoke(app, ["store", command, str(place / study.plan.store.path)])
        assert done.exit_code == 0, done.output
