import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from faulty import files_of
from prefect import Flow
from prefect.client.schemas.objects import State
from small_study import Study

import flows
from orchestration import artifacts, parameters
from orchestration import study as study_module
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError, CorruptArtefactError, MissingArtefactError, PipelineError, StorageError
from pipeline.study.plan import Plan
from pipeline.study.planned import PlannedSAE
from pipeline.train import training

pytestmark = pytest.mark.usefixtures("temporary_server")


@pytest.fixture
def finished(study: Study, tmp_path: Path) -> str:
    """A copy of the small study's workspace, to be changed at will."""
    return str(shutil.copytree(study.workspace.root, tmp_path / "finished"))


def manifests(workspace: str) -> dict[str, int]:
    """When each artefact was made, by path; reports are left out."""
    root = Path(workspace)
    found = {str(path.parent.relative_to(root)): path.stat().st_mtime_ns for path in root.glob("*/*/manifest.json")}
    return {path: made for path, made in found.items() if not path.startswith("reports/")}


def rows(workspace: str) -> dict[str, dict[str, Any]]:
    results = json.loads((Path(workspace) / "reports" / "small" / "results.json").read_text())
    return {row["arm"]: row for row in results["rows"]}


def run(flow: Flow[..., Any], toml: Path, workspace: str, **options: Any) -> State[Any]:
    return flow(str(toml), workspace, **options, return_state=True)


def evaluations(sae: PlannedSAE) -> list[str]:
    """Paths of what evaluation makes of an SAE."""
    return [artefact.path for artefact in (sae.evaluation, *sae.apart.values())]


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
        *["evaluations"] * 9,
    ]
    assert all((Path(workspace) / path / "manifest.json").is_file() for path in made)
    assert "baseline" in (Path(workspace) / "reports" / "small" / "index.html").read_text()
    assert set(rows(workspace)) == {"baseline", "full", "magnitude"}


def test_each_stage_makes_what_it_misses(study: Study, small_toml: Path, finished: str):
    everything = set(manifests(finished))
    dataset = next(iter(study.plan.probes.values()))
    for path in (dataset.path, "saes", "evaluations"):
        shutil.rmtree(Path(finished) / path)
    assert flows.extract(str(small_toml), finished) == [dataset.path]
    assert flows.train(str(small_toml), finished) == [sae.artefact.path for sae in study.plan.saes]
    assert flows.evaluate(str(small_toml), finished) == [path for sae in study.plan.saes for path in evaluations(sae)]
    assert set(manifests(finished)) == everything


@pytest.mark.parametrize("flow", [flows.extract, flows.train, flows.evaluate, flows.ablation], ids=lambda flow: flow.name)
def test_a_flow_without_anything_to_do_is_cached(flow: Flow[..., Any], small_toml: Path, finished: str):
    before = manifests(finished)
    state = run(flow, small_toml, finished)
    assert (state.name, state.is_completed()) == ("Cached", True)
    assert manifests(finished) == before


def test_a_deleted_sae_and_its_evaluation_are_made_again_and_nothing_else(study: Study, small_toml: Path, finished: str):
    before = manifests(finished)
    full = next(sae for sae in study.plan.saes if sae.arm == "full")
    shutil.rmtree(Path(finished) / full.artefact.path)
    made = flows.ablation(str(small_toml), finished)
    assert set(made) == {full.artefact.path, *evaluations(full)}
    after = manifests(finished)
    assert {path for path in after if after[path] != before[path]} == set(made)


def test_only_the_chosen_arms_are_trained_and_evaluated(study: Study, small_toml: Path, finished: str):
    for kind in ("saes", "evaluations"):
        shutil.rmtree(Path(finished) / kind)
    chosen = next(sae for sae in study.plan.saes if sae.arm == "magnitude")
    assert flows.train(str(small_toml), finished, arms=["magnitude"]) == [chosen.artefact.path]
    assert flows.evaluate(str(small_toml), finished, arms=["magnitude"], seeds=[0], layer=2) == evaluations(chosen)


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
    def lose_magnitude(plan: Plan, workspace: Workspace, **_: Any) -> training.Trained:
        return training.Trained(failed={str(sae): "loss not finite at step 7" for sae in plan.saes})

    for folder in (Path(finished) / "saes").glob("magnitude-*"):
        shutil.rmtree(folder)
    monkeypatch.setattr(training, "train", lose_magnitude)
    for flow in (flows.train, flows.ablation):
        state = run(flow, small_toml, finished)
        assert state.is_failed()
        assert state.message is not None
        assert "magnitude seed 0 layer 2: loss not finite at step 7" in state.message
        with pytest.raises(PipelineError):
            state.result()
    assert set(rows(finished)) == {"baseline", "full"}


def test_degenerate_saes_are_warned_of_and_reported(small_toml: Path, finished: str, caplog: pytest.LogCaptureFixture):
    text = small_toml.read_text().replace("[train]", "[train]\nl1 = 1000.0")
    small_toml.write_text(text.replace("learning_rate = 1e-3", "learning_rate = 1e-1"))  # far enough for every latent to die
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
    monkeypatch.setattr(training, "train", lambda plan, _: training.Trained(failed={str(sae): "no" for sae in plan.saes}))
    assert flows.main([str(small_toml), "--workspace", finished]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: 3 failed: baseline seed 0")


def test_nothing_new_means_that_the_report_is_not_written_again(small_toml: Path, finished: str):
    assert run(flows.ablation, small_toml, finished).name == "Cached"
    page = Path(finished) / "reports" / "small" / "index.html"
    before = page.stat().st_mtime_ns
    assert run(flows.ablation, small_toml, finished).name == "Cached"
    assert page.stat().st_mtime_ns == before
    small_toml.write_text(small_toml.read_text().replace("small enough for a test", "that asks something else"))
    assert run(flows.ablation, small_toml, finished).name == "Cached"
    assert "that asks something else" in page.read_text()


def test_a_run_that_finds_everything_done_loads_no_torch(study: Study, finished: str, tmp_path: Path):
    toml = study.workspace.root.parent / "small.toml"
    flows.ablation(str(toml), finished)
    code = f"""
import sys, flows
from prefect.testing.utilities import prefect_test_harness
with prefect_test_harness(server_startup_timeout=90):
    assert flows.ablation({str(toml)!r}, {finished!r}, return_state=True).name == "Cached"
assert not {{"torch", "matplotlib", "scipy", "transformers"}} & set(sys.modules)
"""
    environment = os.environ | {"PREFECT_HOME": str(tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("flow", "kinds"),
    [(flows.extract, {"models", "stores", "probes"}), (flows.train, {"saes"}), (flows.evaluate, {"evaluations"})],
)
def test_force_makes_one_stage_again_and_touches_no_other(
    flow: Flow[..., Any], kinds: set[str], small_toml: Path, finished: str
):
    before = manifests(finished)
    assert run(flow, small_toml, finished, force=True).name == "Completed"
    after = manifests(finished)
    assert after.keys() == before.keys()
    assert {path.split("/")[0] for path in after if after[path] != before[path]} == kinds


def test_force_keeps_what_was_not_chosen(study: Study, small_toml: Path, finished: str):
    before = manifests(finished)
    chosen = next(sae for sae in study.plan.saes if sae.arm == "magnitude")
    assert flows.train(str(small_toml), finished, arms=["magnitude"], force=True) == [chosen.artefact.path]
    after = manifests(finished)
    assert {path for path in after if after[path] != before[path]} == {chosen.artefact.path}


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    emitted: list[dict[str, Any]] = []
    monkeypatch.setattr(study_module, "emit_event", lambda event, **more: emitted.append({"event": event, **more}))
    return emitted


def test_only_fresh_activations_are_announced(study: Study, small_toml: Path, finished: str, events: list[dict[str, Any]]):
    flows.extract(str(small_toml), finished)
    shutil.rmtree(Path(finished) / next(iter(study.plan.probes.values())).path)
    flows.extract(str(small_toml), finished)
    assert events == []
    shutil.rmtree(Path(finished) / study.plan.store.path)
    flows.extract(str(small_toml), finished)
    (event,) = events
    assert event["event"] == "activations.ready"
    assert event["resource"]["dasae.experiment"] == "small"
    assert event["payload"] == {"experiment": str(small_toml), "workspace": finished}


def test_trouble_with_files_is_tried_again_and_nothing_else_is(
    study, small_toml: Path, finished: str, monkeypatch: pytest.MonkeyPatch
):
    shutil.rmtree(Path(finished) / "saes")
    monkeypatch.setattr(study_module, "train_cohort", study_module.train_cohort.with_options(retry_delay_seconds=0))
    genuine, raised, tries = training.train, StorageError("the disk is full"), []

    def train(plan: Plan, workspace: Workspace, **options: Any) -> training.Trained:
        tries.append(plan.arms_in_words)
        if len(tries) < 3:
            raise raised
        return genuine(plan, workspace, **options)

    monkeypatch.setattr(training, "train", train)
    assert run(flows.train, small_toml, finished).name == "Completed"
    assert len(tries) == 3
    for raised, expected in (
        (OSError("input/output error"), 4),
        (CorruptArtefactError("a file was changed"), 1),
        (RuntimeError("a defect"), 1),
        (PermissionError("not yours"), 1),
    ):
        tries.clear()
        monkeypatch.setattr(
            training,
            "train",
            lambda plan, _, raised=raised, **__: (tries.append(plan.arms_in_words), (_ for _ in ()).throw(raised)),
        )
        state = run(flows.train, small_toml, finished, force=True)
        assert state.is_failed()
        assert state.message is not None
        assert str(raised) in state.message
        assert len(tries) == expected, raised


def test_damage_to_one_sae_costs_the_others_nothing(study: Study, small_toml: Path, finished: str):
    shutil.rmtree(Path(finished) / "evaluations")
    full = next(sae for sae in study.plan.saes if sae.arm == "full")
    weights = Path(finished) / full.artefact.path / "sae_weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    state = run(flows.ablation, small_toml, finished)
    assert state.is_failed()
    assert state.message is not None
    assert state.message.startswith("1 failed: full seed 0 layer 2: ")
    assert "was changed after it was made" in state.message
    assert set(rows(finished)) == {"baseline", "magnitude"}


def test_a_server_that_is_away_does_not_end_the_work(
    small_toml: Path, finished: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def away(*_: Any, **__: Any) -> None:
        raise ConnectionError("the server is away")

    for name in ("create_progress_artifact", "create_table_artifact", "create_link_artifact", "create_markdown_artifact"):
        monkeypatch.setattr(artifacts, name, away)
    shutil.rmtree(Path(finished) / "saes")
    assert run(flows.ablation, small_toml, finished).name == "Completed"
    assert "not shown on Prefect's pages: the server is away" in caplog.text


def test_a_run_leaves_its_results_on_prefect_s_pages(small_toml: Path, finished: str):
    from prefect.client.orchestration import get_client

    shutil.rmtree(Path(finished) / "saes")
    flows.ablation(str(small_toml), finished)
    with get_client(sync_client=True) as client:
        found = client.request("POST", "/artifacts/latest/filter", json={}).json()
    by_key = {artifact["key"]: artifact for artifact in found}
    table = json.loads(by_key["small-results"]["data"])
    assert [row["arm"] for row in table] == ["baseline", "full", "magnitude"]
    assert all(isinstance(row["probing k=5"], float) for row in table)
    assert "![planned differences](data:image/svg+xml;base64," in by_key["small-comparison-layer-2"]["data"]
    assert f"file://{finished}/reports/small/index.html" in by_key["small-report"]["data"]
    assert by_key["small-train-3-saes"]["data"] == 100.0


def test_the_report_is_linked_where_it_is_served(finished: str, monkeypatch: pytest.MonkeyPatch):
    from prefect import flow

    links: list[str] = []
    monkeypatch.setattr(artifacts, "create_link_artifact", lambda link, **_: links.append(link))
    monkeypatch.setenv("DASAE_REPORTS", "http://127.0.0.1:4300/")
    flow(lambda: artifacts.show_report("my-study", Workspace(finished).report("my-study")), name="linked")()
    assert links == ["http://127.0.0.1:4300/my-study/"]


def test_work_that_takes_long_to_begin_is_shown_too(
    study: Study, small_toml: Path, finished: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(artifacts, "SECONDS_BETWEEN_LINES", -1.0)
    shutil.rmtree(Path(finished) / "stores")  # packing reports no tokens until a sequence is full
    assert run(flows.extract, small_toml, finished).is_completed()


def test_a_run_s_name_says_experiment_arms_and_key(study: Study, small_toml: Path):
    chosen = {"experiment": str(small_toml), "arms": ["full", "baseline"], "seeds": [0], "layer": 2}
    assert (
        parameters.name_of("train", chosen) == f"train small · full, baseline · seeds 0 · layer 2 · {study.plan.store.key}"
    )
    assert parameters.name_of("train", {"experiment": "no-such"}) == "train no-such"
    many = {"experiment": str(small_toml), "arms": parameters.known_arms(), "seeds": [], "layer": None}
    assert " arms · " in parameters.name_of("evaluate", many)


def test_the_form_offers_the_arms_and_refuses_what_cannot_be():
    schema = flows.train.parameters.model_dump()["properties"]
    assert schema["arms"]["items"]["enum"] == parameters.known_arms()
    assert {"baseline", "literal", "no-contrast-l0"} <= set(schema["arms"]["items"]["enum"])
    assert schema["seeds"]["items"]["minimum"] == 0
    assert schema["layer"]["anyOf"][0]["minimum"] == 0
    for flow in (flows.extract, flows.train, flows.evaluate, flows.ablation):
        described = flow.parameters.model_dump()["properties"]
        assert all(field["description"] for field in described.values())


def test_names_from_parameters_stay_in_the_workspace(small_toml: Path, tmp_path: Path, finished: str):
    outside = tmp_path / "outside.toml"
    shutil.copy(small_toml, outside)
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(finished)}
    for experiment in ("../outside", "..", "a/../../outside"):
        assert run(flows.ablation, Path(experiment), finished).is_failed()
    assert run(flows.train, small_toml, finished, arms=["../../x"]).is_failed()
    hidden = tmp_path / "..small.toml"
    shutil.copy(small_toml, hidden)
    state = run(flows.ablation, hidden, finished)
    assert state.is_failed()
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(finished)} == before | {hidden}


def test_prefect_opens_sqlite_with_a_write_ahead_log_and_patience():
    """No setting of Prefect's changes either; docs/operations.md says so."""
    import asyncio

    from prefect.server.database import provide_database_interface
    from sqlalchemy import text

    async def pragmas() -> list[Any]:
        async with provide_database_interface().session_context() as session:
            return [(await session.execute(text(f"PRAGMA {name}"))).scalar() for name in ("journal_mode", "busy_timeout")]

    assert asyncio.run(pragmas()) == ["wal", 60_000]


def test_extraction_in_many_small_tasks_opens_the_model_once_and_makes_the_same_bytes(
    study: Study, small_toml: Path, finished: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from orchestration.engine import Local
    from pipeline.extract import extraction
    from pipeline.extract.extraction import Extraction

    store = study.plan.store
    shutil.rmtree(Path(finished) / store.path)
    monkeypatch.setattr(Local, "shared", True)
    opened, written = [], []
    open_model, write = extraction.open_study_model, Extraction.write
    monkeypatch.setattr(extraction, "open_study_model", lambda *given: opened.append(given) or open_model(*given))
    monkeypatch.setattr(Extraction, "write", lambda self, work: written.append(work) or write(self, work))
    assert flows.extract(str(small_toml), finished) == [store.path]
    assert len(opened) == 1
    assert [len(work[store.path]) for work in written] == [2, 1, 1, 1]
    assert files_of(Path(finished) / store.path) == files_of(study.workspace.local / store.path)
    assert not study_module._OPEN  # pyright: ignore[reportPrivateUsage] - training needs the memory
