"""The finished small study: published SAEs, evaluations and results, and what makes them be made again."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_study import Study

from pipeline import cli
from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.workspace import Workspace
from pipeline.evaluate.evaluation import evaluate
from pipeline.report.collect import collect
from pipeline.report.page import write_report
from pipeline.report.results import Arm
from pipeline.sae.formats import CONFIG, WEIGHTS, read_sae, write_sae
from pipeline.sae.sae import SAE
from pipeline.store.batches import rows_in_order
from pipeline.store.reader import ActivationStore
from pipeline.study.evaluations import EVALUATIONS, Need
from pipeline.study.experiment import Experiment
from pipeline.study.plan import TRAINING_LOG, make_plan
from pipeline.study.planned import PlannedSAE
from pipeline.train.training import train

INTERFERENCE, LOSS = EVALUATIONS["interference"].file, EVALUATIONS["loss"].file


@pytest.fixture
def own(study: Study, tmp_path: Path) -> Study:
    """A copy of the study that a test may change."""
    shutil.copytree(study.workspace.root, tmp_path / "workspace")
    return Study(study.experiment, study.plan, Workspace(tmp_path / "workspace"))


def made_at(study: Study) -> dict[str, int]:
    """When each artefact was finished."""
    return {str(path.parent): path.stat().st_mtime_ns for path in study.workspace.root.rglob("manifest.json")}


def test_every_sae_is_trained_and_evaluated(study: Study) -> None:
    for sae in study.plan.saes:
        trained, evaluated = study.workspace.manifest(sae.artefact), study.workspace.manifest(sae.evaluation)
        assert trained is not None
        assert evaluated is not None
        assert trained.facts["steps"] == 120
        assert set(trained.files) == {CONFIG, WEIGHTS, TRAINING_LOG}
        assert evaluated.facts["degenerate"] is None
        assert set(evaluated.files) == {
            of.file for of in EVALUATIONS.values() if of.apart is None and not of.needs & {Need.truth, Need.saelens}
        }
        assert set(sae.apart) == {"geometry", "browsing"}  # one seed has no stability
        for name, artefact in sae.apart.items():
            apart = study.workspace.manifest(artefact)
            assert apart is not None
            assert set(apart.files) == {EVALUATIONS[name].file}


def test_results_have_a_row_for_every_arm_and_seed(study: Study) -> None:
    results = collect(study.plan, study.workspace)
    assert [(row.arm, row.seed, row.layer) for row in results.rows] == [
        ("baseline", 0, 2), ("full", 0, 2), ("magnitude", 0, 2)
    ]  # fmt: skip
    for row in results.rows:
        assert row.tokens == 120 * 128
        assert 0 < row.at(("fvu",)) < 1
        assert 0 < row.at(("l0",)) < 96
        assert set(row.sparse_probing or ()) == set(row.llm_probing or ()) == {"all", "1", "5"}
        assert set(row.sparse_probing_by_task or ()) == {"python/text-kind", "python/docstring-of"}
        for name in ("row", "column", "union", "mutual", "chance", "random_tied"):
            assert 0 <= row.at(("bpcr", name)) <= 1
        assert row.at(("bpcr", "row")) == pytest.approx((row.at(("bpcr", "union")) + row.at(("bpcr", "mutual"))) / 2)
    # The model's own probes are one measurement, not one per SAE.
    assert len({json.dumps(row.llm_probing) for row in results.rows}) == 1
    assert results.missing == ()
    assert all(curve.step[-1] == 120 for curve in results.curves)


def test_published_saes_load_in_saelens_with_the_same_latents(study: Study) -> None:
    from pipeline.runtime.compatibility import importing_sae_bench

    with importing_sae_bench():
        import sae_lens  # a dependency of sae-bench

    store = ActivationStore(study.workspace.folder(study.plan.store))
    x_BD = next(rows_in_order(store, 2, [0]))
    for planned in study.plan.saes:
        folder = study.workspace.folder(planned.artefact)
        theirs, ours = sae_lens.SAE.load_from_disk(folder), read_sae(folder)
        assert theirs.cfg.metadata.hook_name == "blocks.2.hook_resid_post"
        with torch.no_grad():
            torch.testing.assert_close(theirs.encode(x_BD), ours.encode(x_BD), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(
                theirs.decode(theirs.encode(x_BD)), ours.decode(ours.encode(x_BD)), atol=1e-5, rtol=1e-5
            )
        torch.testing.assert_close(ours.W_dec_FD.norm(dim=1), torch.ones(96), atol=1e-5, rtol=1e-5)


def test_fvu_is_recomputed_from_the_published_weights(study: Study) -> None:
    store = ActivationStore(study.workspace.folder(study.plan.store))
    x_BD = torch.cat(list(rows_in_order(store, 2, [store.layout.shards - 1])))
    for planned, row in zip(study.plan.saes, collect(study.plan, study.workspace).rows, strict=True):
        sae = read_sae(study.workspace.folder(planned.artefact))
        f_BF = sae.encode(x_BD)
        error, variance = (x_BD - sae.decode(f_BF)).square().sum(), (x_BD - x_BD.mean(dim=0)).square().sum()
        assert row.fvu == pytest.approx(float(error / variance), rel=1e-3)
        assert row.l0 == pytest.approx(float((f_BF > 0).sum(dim=1).float().mean()), rel=1e-5)


def test_doing_it_again_does_nothing(own: Study) -> None:
    before = made_at(own)
    assert train(own.plan, own.workspace).made == []
    assert evaluate(own.plan, own.workspace).made == []
    assert made_at(own) == before


def test_a_deleted_sae_is_made_again_bit_for_bit_with_its_evaluation_and_nothing_else(own: Study) -> None:
    before = made_at(own)
    lost = own.plan.saes[1]
    weights = (own.workspace.folder(lost.artefact) / WEIGHTS).read_bytes()
    shutil.rmtree(own.workspace.folder(lost.artefact))
    assert train(own.plan, own.workspace).made == [lost]
    assert evaluate(own.plan, own.workspace).made == [lost]
    assert (own.workspace.folder(lost.artefact) / WEIGHTS).read_bytes() == weights
    changed = {path for path, time in made_at(own).items() if before[path] != time}
    again = (lost.artefact, lost.evaluation, *lost.apart.values())
    assert changed == {str(own.workspace.folder(artefact)) for artefact in again}


def replace_weights(study: Study, planned: PlannedSAE, change: Callable[[SAE], SAE]) -> None:
    """Publish another SAE in the place of a finished one."""
    folder = study.workspace.folder(planned.artefact)
    metadata = json.loads((folder / CONFIG).read_text())["metadata"]
    write_sae(change(read_sae(folder)), folder, metadata)
    manifest = study.workspace.manifest(planned.artefact)
    assert manifest is not None
    study.workspace.publish(planned.artefact, facts=manifest.facts)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (-1e9, "no latent fires on class source of python/text-kind"),
        (float("nan"), "its reconstructions of held-out rows are not finite"),
    ],
)
def test_a_dead_or_broken_sae_is_called_degenerate_and_not_one_half(own: Study, bias: float, message: str) -> None:
    broken = own.plan.saes[1]
    replace_weights(own, broken, lambda sae: replace(sae, b_enc_F=torch.full_like(sae.b_enc_F, bias)))
    result = evaluate(own.plan, own.workspace)
    assert result.made == [broken]
    assert result.degenerate == {"full seed 0 layer 2": message}
    row = collect(own.plan, own.workspace).rows[1]
    assert row.degenerate == message
    assert row.sparse_probing is None


def test_the_command_fails_when_an_sae_is_degenerate(
    own: Study, small_toml: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["dasae", "evaluate", str(small_toml), "--workspace", str(own.workspace.root)]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as sound:
        cli.main()
    assert sound.value.code == 0
    replace_weights(own, own.plan.saes[1], lambda sae: replace(sae, b_enc_F=torch.full_like(sae.b_enc_F, -1e9)))
    with pytest.raises(SystemExit) as failed:
        cli.main()
    assert failed.value.code == 1
    assert "degenerate: full seed 0 layer 2: no latent fires" in " ".join(capsys.readouterr().out.split())


def test_every_arm_is_measured_on_the_pairs_of_the_baseline(study: Study) -> None:
    baseline = study.plan.saes[0]
    by_arm = {
        planned.arm: json.loads((study.workspace.folder(planned.evaluation) / INTERFERENCE).read_text())
        for planned in study.plan.saes
    }
    assert {sets["fixed"]["pairs"] for sets in by_arm.values()} == {by_arm["baseline"]["own"]["pairs"]}
    assert by_arm["baseline"]["fixed"] == by_arm["baseline"]["own"] | {"same_direction": pytest.approx(1)}
    assert by_arm["baseline"]["both"]["change"] == 0
    for sets in by_arm.values():
        assert sets["both"]["pairs"] >= max(sets["own"]["pairs"], sets["fixed"]["pairs"])
        assert sets["both"]["change"] == pytest.approx(sets["both"]["interference"] - sets["both"]["baseline"])
    for planned in study.plan.saes:
        manifest = study.workspace.manifest(planned.evaluation)
        assert manifest
        assert set(manifest.parents) == {planned.artefact.path, baseline.artefact.path}
        assert by_arm[planned.arm]["reason"] is None


def test_an_evaluation_without_a_baseline_says_so_and_is_made_again_when_there_is_one(own: Study) -> None:
    baseline, full = own.plan.saes[0], own.plan.saes[1]
    shutil.rmtree(own.workspace.folder(baseline.artefact))
    assert full in evaluate(own.plan, own.workspace).made
    without = json.loads((own.workspace.folder(full.evaluation) / INTERFERENCE).read_text())
    assert without["fixed"] is None
    assert without["reason"] == "the arm `baseline` of this seed is not trained"
    assert evaluate(own.plan, own.workspace).made == []
    train(own.plan, own.workspace)
    assert full in evaluate(own.plan, own.workspace).made
    assert json.loads((own.workspace.folder(full.evaluation) / INTERFERENCE).read_text())["fixed"]


@pytest.mark.parametrize("arm", ["magnitude", "baseline"])
def test_an_sae_of_another_size_costs_the_others_nothing(own: Study, arm: str) -> None:
    shutil.rmtree(own.workspace.local / "evaluations")
    harmed = next(sae for sae in own.plan.saes if sae.arm == arm)
    weights = own.workspace.folder(harmed.artefact) / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    result = evaluate(own.plan, own.workspace)
    assert list(result.failed) == [str(harmed)]
    assert "bytes instead of" in result.failed[str(harmed)]
    assert [sae.arm for sae in result.made] == [sae.arm for sae in own.plan.saes if sae is not harmed]
    other = own.workspace.folder(result.made[-1].evaluation) / INTERFERENCE
    reason = json.loads(other.read_text())["reason"]
    assert reason.startswith("the arm `baseline` of this seed is damaged: ") if arm == "baseline" else reason is None


def test_a_study_without_the_arm_baseline_says_so(own: Study, small_toml: Path) -> None:
    text = small_toml.read_text().replace('"baseline", ', "").replace("k_values = [1, 5]", "k_values = [1]\nloss_tokens = 0")
    small_toml.write_text(text)
    plan = make_plan(Experiment.load(str(small_toml)))
    assert all(planned.baseline is None for planned in plan.saes)
    made = evaluate(plan, own.workspace).made
    assert [planned.arm for planned in made] == ["full", "magnitude"]
    read = {name: json.loads((own.workspace.folder(made[0].evaluation) / name).read_text()) for name in (INTERFERENCE, LOSS)}
    assert read[INTERFERENCE]["reason"] == "the study has no arm `baseline`"
    assert read[LOSS]["clean"] is None
    assert read[LOSS]["reason"] == "evaluate.loss_tokens is 0"


def test_an_untrained_arm_is_named_and_the_others_are_evaluated(own: Study) -> None:
    lost = own.plan.saes[2]
    shutil.rmtree(own.workspace.folder(lost.artefact))
    result = evaluate(own.plan, own.workspace)
    assert result.untrained == ["magnitude seed 0 layer 2"]
    assert list(collect(own.plan, own.workspace).missing) == ["magnitude seed 0 layer 2"]


def test_a_changed_arm_reuses_the_store(own: Study, small_toml: Path) -> None:
    small_toml.write_text(small_toml.read_text() + "\n[train.contrast]\ncoefficient = 0.3\n")
    plan = make_plan(Experiment.load(str(small_toml)))
    assert [sae.arm for sae in train(plan, own.workspace).made] == ["full", "magnitude"]


def test_an_arm_of_the_experiment_s_own_is_all_that_is_trained_and_the_report_says_what_it_asks(
    own: Study, small_toml: Path
) -> None:
    text = small_toml.read_text().replace('"magnitude"]', '"dense"]')
    small_toml.write_text(text + '\n[arms.dense]\nfrom = "baseline"\nquestion = "Is it the sparsity?"\nl1 = 0.01\n')
    plan = make_plan(Experiment.load(str(small_toml)))
    assert [sae.arm for sae in train(plan, own.workspace).made] == ["dense"]
    assert [sae.arm for sae in evaluate(plan, own.workspace).made] == ["dense"]
    results = collect(plan, own.workspace)
    assert results.arms[-1] == Arm(arm="dense", run=None, question="Is it the sparsity?", base="baseline")
    # The baseline's recipe and its initial weights, with less of the sparsity term.
    baseline, _, dense = results.rows
    assert dense.at(("l0",)) > baseline.at(("l0",))
    page = Path(write_report(results, own.workspace.report("small"))).read_text()
    assert ">Is it the sparsity?<" in page
    assert ">None<" not in page


def test_no_artefact_holds_a_pickle(study: Study) -> None:
    suffixes = {path.suffix for path in study.workspace.root.rglob("*") if path.is_file()}
    assert suffixes <= {"", ".json", ".jsonl", ".safetensors"}
    for path in study.workspace.root.rglob("*"):
        if path.is_file():
            assert not path.read_bytes().startswith(b"\x80\x04")


def test_a_manifest_says_what_an_artefact_was_made_from(study: Study) -> None:
    manifest = study.workspace.manifest(study.plan.saes[1].artefact)
    assert manifest is not None
    assert manifest.inputs["store"] == study.plan.store.key
    assert manifest.inputs["recipe"]["contrast"]["coefficient"] == 0.1
    assert Artefact(kind="saes", label="x", inputs=manifest.inputs).key == manifest.key
    assert math.isfinite(manifest.facts["seconds"])
