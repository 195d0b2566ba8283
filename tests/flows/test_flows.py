import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.client.schemas.objects import State
from prefect.settings import PREFECT_FLOWS_HEARTBEAT_FREQUENCY, PREFECT_HOME, temporary_settings
from prefect.testing.utilities import prefect_test_harness

import flows
from pipeline.errors import BadInputError, MissingArtefactError, PipelineError
from pipeline.plan import Plan
from pipeline.train import stage
from pipeline.workspace import Workspace


@pytest.fixture(scope="module", autouse=True)
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with (
        temporary_settings({PREFECT_HOME: tmp_path_factory.mktemp("prefect")}),
        prefect_test_harness(server_startup_timeout=90),
        # Each flow run would wait a second for the heartbeat's thread.
        temporary_settings({PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}),
    ):
        yield


@pytest.fixture
def finished(study, tmp_path: Path) -> str:
    """A copy of the small study's workspace, to be changed at will."""
    return str(shutil.copytree(study.workspace.root, tmp_path / "finished"))


def manifests(workspace: str) -> dict[str, int]:
    root = Path(workspace)
    return {str(path.parent.relative_to(root)): path.stat().st_mtime_ns for path in root.rglob("manifest.json")}


def rows(workspace: str) -> dict[str, dict]:
    results = json.loads((Path(workspace) / "reports" / "small" / "results.json").read_text())
    return {row["arm"]: row for row in results["rows"]}


def run(flow, toml: Path, workspace: str, **options) -> State:
    return flow(str(toml), workspace, **options, return_state=True)


def test_ablation_goes_from_nothing_to_the_report(small_toml: Path, tmp_path: Path):
    workspace = str(tmp_path / "workspace")
    state = run(flows.ablation, small_toml, workspace)
    assert state.name == "Completed"
    made = state.result()
    assert [path.split("/")[0] for path in made] == [
        "models",
        "stores",
        *["probes"] * 2,
        *["saes"] * 3,
        *["evaluations"] * 3,
    ]
    assert all((Path(workspace) / path / "manifest.json").is_file() for path in made)
    assert "baseline" in (Path(workspace) / "reports" / "small" / "index.html").read_text()
    assert set(rows(workspace)) == {"baseline", "full", "magnitude"}


def test_each_stage_makes_what_it_misses(study, small_toml: Path, finished: str):
    everything = set(manifests(finished))
    dataset = next(iter(study.plan.probes.values()))
    for path in (dataset.path, "saes", "evaluations"):
        shutil.rmtree(Path(finished) / path)
    assert flows.extract(str(small_toml), finished) == [dataset.path]
    assert flows.train(str(small_toml), finished) == [sae.artefact.path for sae in study.plan.saes]
    assert flows.evaluate(str(small_toml), finished) == [sae.evaluation.path for sae in study.plan.saes]
    assert set(manifests(finished)) == everything


@pytest.mark.parametrize("flow", [flows.extract, flows.train, flows.evaluate, flows.ablation], ids=lambda flow: flow.name)
def test_a_flow_without_anything_to_do_is_cached(flow, small_toml: Path, finished: str):
    before = manifests(finished)
    state = run(flow, small_toml, finished)
    assert (state.name, state.is_completed()) == ("Cached", True)
    assert manifests(finished) == before


def test_a_deleted_sae_and_its_evaluation_are_made_again_and_nothing_else(study, small_toml: Path, finished: str):
    before = manifests(finished)
    full = next(sae for sae in study.plan.saes if sae.arm == "full")
    shutil.rmtree(Path(finished) / full.artefact.path)
    made = flows.ablation(str(small_toml), finished)
    assert set(made) == {full.artefact.path, full.evaluation.path}
    after = manifests(finished)
    assert {path for path in after if after[path] != before[path]} == set(made)


def test_only_the_chosen_arms_are_trained_and_evaluated(study, small_toml: Path, finished: str):
    for kind in ("saes", "evaluations"):
        shutil.rmtree(Path(finished) / kind)
    chosen = next(sae for sae in study.plan.saes if sae.arm == "magnitude")
    assert flows.train(str(small_toml), finished, arms=["magnitude"]) == [chosen.artefact.path]
    assert flows.evaluate(str(small_toml), finished, arms=["magnitude"], seeds=[0], layer=2) == [chosen.evaluation.path]


def test_training_before_extraction_says_what_to_do(small_toml: Path, tmp_path: Path):
    state = run(flows.train, small_toml, str(tmp_path / "empty"))
    assert state.is_failed()
    assert state.message is not None
    assert state.message.endswith(f"does not exist yet; make it with: dasae extract {small_toml}")
    assert "\n" not in state.message
    with pytest.raises(MissingArtefactError):
        flows.train(str(small_toml), str(tmp_path / "empty"))


def test_an_unknown_arm_fails_with_the_known_ones(small_toml: Path, finished: str):
    state = run(flows.train, small_toml, finished, arms=["fulll"])
    assert state.is_failed()
    assert state.message == "arm 'fulll' is not part of the study, which has ['baseline', 'full', 'magnitude']"
    with pytest.raises(BadInputError):
        flows.evaluate(str(small_toml), finished, layer=1)


def test_errors_are_logged_without_traceback(small_toml: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    run(flows.train, small_toml, str(tmp_path / "empty"))
    assert "MissingArtefactError" in caplog.text
    assert "Traceback" not in caplog.text


def test_diverged_saes_fail_the_flow_after_the_others_are_reported(
    small_toml: Path, finished: str, monkeypatch: pytest.MonkeyPatch
):
    def lose_magnitude(plan: Plan, workspace: Workspace) -> stage.Trained:
        return stage.Trained(failed={str(sae): "loss not finite at step 7" for sae in plan.saes})

    for folder in (Path(finished) / "saes").glob("magnitude-*"):
        shutil.rmtree(folder)
    monkeypatch.setattr(stage, "train", lose_magnitude)
    for flow in (flows.train, flows.ablation):
        state = run(flow, small_toml, finished)
        assert state.is_failed()
        assert state.message is not None
        assert "magnitude seed 0 layer 2: loss not finite at step 7" in state.message
        with pytest.raises(PipelineError):
            state.result()
    assert set(rows(finished)) == {"baseline", "full"}


def test_degenerate_saes_are_warned_of_and_reported(small_toml: Path, finished: str, caplog: pytest.LogCaptureFixture):
    small_toml.write_text(small_toml.read_text().replace("[train]", "[train]\nl1 = 1000.0"))
    state = run(flows.ablation, small_toml, finished)
    assert state.name == "Completed"
    assert "baseline seed 0 layer 2 is degenerate" in caplog.text
    assert rows(finished)["baseline"]["degenerate"]


def test_the_command_prints_the_table_and_the_report(small_toml: Path, finished: str, capsys: pytest.CaptureFixture[str]):
    assert flows.main([str(small_toml), "--workspace", finished]) == 0
    out = capsys.readouterr().out
    assert "magnitude" in out
    assert "nothing to do" in out
    assert str(Path(finished) / "reports" / "small" / "index.html") in out


def test_the_command_ends_with_the_exit_code_of_the_error(
    small_toml: Path, finished: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    assert flows.main(["no-such-study", "--workspace", finished]) == 2
    assert capsys.readouterr().err.startswith("error: no experiment 'no-such-study'")
    shutil.rmtree(Path(finished) / "saes")
    monkeypatch.setattr(stage, "train", lambda plan, _: stage.Trained(failed={str(sae): "no" for sae in plan.saes}))
    assert flows.main([str(small_toml), "--workspace", finished]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: 3 failed: baseline seed 0")
