"""sae-bench's evaluations of a finished study, against sae-bench's own commands on the same SAE, model and data sets."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_study import Study
from typer.testing import CliRunner

from pipeline.artefacts.workspace import Workspace
from pipeline.cli import app
from pipeline.errors import BadInputError, EvaluationError
from pipeline.evaluate.bench import Bench, LayerBench, ProbeScores
from pipeline.evaluate.evaluation import evaluate, unmeasured
from pipeline.evaluate.saebench import suite, whole
from pipeline.evaluate.saebench.suite import Suite, running
from pipeline.report.collect import collect
from pipeline.runtime.compatibility import importing_sae_bench, quiet_sae_bench
from pipeline.sae.finished import open_sae
from pipeline.study.experiment import Experiment
from pipeline.study.litter import What, litter
from pipeline.study.plan import Plan, make_plan

AMAZON = "canrager/amazon_reviews_mcauley_1and5"
PROBED = ["5_hist_fig_ismale", "105_click_bait"]
CATEGORIES = {1: "return", 2: "import", 3: "string", 5: "class", 6: "value"}
RATINGS = {1.0: "error", 5.0: "None"}
ASKED = ("core", "scr", "tpp", "absorption", "meta_structure", "sparse_probing_sae_probes")


def settings(data: Path) -> dict[str, Any]:
    of_reviews = {"dataset_names": [AMAZON], "train_set_size": 72, "test_set_size": 40, "n_values": [2, 20]}
    pairs = {AMAZON: [["Toys_and_Games", "Electronics"], ["Industrial_and_Scientific", "Toys_and_Games"]]}
    return {
        "data": str(data),
        "core": {"dataset": "words", "n_eval_reconstruction_batches": 2, "batch_size_prompts": 4},
        "scr": of_reviews | {"column1_vals_lookup": pairs},
        "tpp": of_reviews,
        "meta_structure": {"train_steps": 8, "train_batch_size": 32},
        "sparse_probing_sae_probes": {"dataset_names": PROBED, "ks": [1, 5]},
    }


def write_data_sets(folder: Path) -> None:
    """Under the names of the Hub: reviews by category and rating, of which the words tell, and plain texts."""
    generator = np.random.default_rng(0)
    words = [*CATEGORIES.values(), *RATINGS.values(), "self", "for", "path", "the", "of", "and"]

    def text(*telling: str) -> str:
        return " ".join(str(generator.choice([*telling, str(generator.choice(words))])) for _ in range(12))

    reviews = folder / AMAZON
    reviews.mkdir(parents=True)
    for split, each in (("train", 40), ("test", 24)):
        cells = [(category, rating) for category in CATEGORIES for rating in RATINGS] * each
        texts = [text(CATEGORIES[category], RATINGS[rating]) for category, rating in cells]
        categories, ratings = zip(*cells, strict=True)
        pq.write_table(pa.table({"text": texts, "category": categories, "rating": ratings}), reviews / f"{split}.parquet")
    plain = folder / "words"
    plain.mkdir()
    pq.write_table(pa.table({"text": [text(*words) for _ in range(400)]}), plain / "train.parquet")


def asking(experiment: Experiment, data: Path, *names: str) -> Experiment:
    """The same experiment, with evaluations of sae-bench."""
    declared = json.loads(experiment.model_dump_json(exclude_unset=True))
    declared["evaluate"] = declared.get("evaluate", {}) | {"saebench": list(names)}
    return Experiment.model_validate_json(json.dumps(declared | {"saebench": settings(data)}), strict=True)


@dataclass(frozen=True)
class Measured:
    plan: Plan
    workspace: Workspace
    data: Path

    def file(self, arm: str, name: str) -> dict[str, Any]:
        (sae,) = [sae for sae in self.plan.saes if sae.arm == arm]
        return json.loads(self.workspace.verified(sae.apart[name], f"{name}.json").read_text())

    def bench(self, arm: str) -> Bench:
        (sae,) = [sae for sae in self.plan.saes if sae.arm == arm]
        layer = LayerBench(self.plan, 2, self.workspace)
        return Bench(layer, sae, open_sae(sae.artefact, self.workspace), ProbeScores(model={}, sae=None))


@pytest.fixture(scope="module")
def measured(study: Study, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """The finished study, to which sae-bench's evaluations were added."""
    folder = tmp_path_factory.mktemp("saebench")
    shutil.copytree(study.workspace.local, folder / "workspace")
    write_data_sets(folder / "data")
    plan, workspace = make_plan(asking(study.experiment, folder / "data", *ASKED)), Workspace(folder / "workspace")
    before = torch.random.get_rng_state()
    result = evaluate(plan, workspace)
    assert result.failed == {}
    assert len(result.made) == 3
    assert {path.split("/")[1].rsplit("-", 3)[0] for path in result.paths} == set(ASKED), "nothing else is made again"
    assert torch.equal(torch.random.get_rng_state(), before)
    return Measured(plan, workspace, folder / "data")


@pytest.fixture
def theirs(measured: Measured, monkeypatch: pytest.MonkeyPatch) -> Iterator[Suite]:
    """sae-bench as its users run it: in the folder of the data sets, with an exported SAE and the study's model."""
    with importing_sae_bench():
        import transformer_lens

        monkeypatch.chdir(measured.data)
        with quiet_sae_bench(), torch.enable_grad():  # it switches gradients on and off, and leaves them so
            found = Suite("core", measured.bench("full"))
            model = found.model("float32")
            monkeypatch.setattr(
                transformer_lens.HookedTransformer, "from_pretrained_no_processing", lambda *_args, **_options: model
            )
            yield found


def exported(theirs: Suite) -> Any:
    import sae_lens

    with theirs.exported() as folder:
        return sae_lens.SAE.load_from_disk(str(folder), device="cpu")


def numbers(value: Any) -> Any:
    """All results but those that name a run and its time."""
    kept = ("eval_result_metrics", "eval_result_details", "eval_result_unstructured", "eval_type_id")
    found = json.loads(json.dumps({name: value.get(name) for name in kept}))
    found["eval_result_metrics"].get("meta_structure", {}).pop("train_time_seconds", None)
    return found


@pytest.mark.parametrize("name", ["scr", "tpp"])
def test_concepts_are_those_of_the_second_run_of_sae_bench(
    measured: Measured, theirs: Suite, name: str, tmp_path: Path
) -> None:
    from sae_bench.evals.scr_and_tpp import main

    config = Suite(name, theirs.on).config(perform_scr=name == "scr")
    runs = [
        main.run_eval(
            config, [("theirs", exported(theirs))], "cpu", str(tmp_path), True, False, True, str(tmp_path / "acts")
        )
        for _ in range(2)
    ]
    ours = measured.file("full", name)
    assert numbers(ours) == numbers(runs[1]["theirs_custom_sae"])
    scores = next(iter(ours["eval_result_metrics"].values()))
    assert len({value for value in scores.values() if value is not None}) > 2, "scores that say something"


def test_core_is_that_of_sae_bench(measured: Measured, theirs: Suite, tmp_path: Path) -> None:
    from sae_bench.evals.core import main

    core = settings(measured.data)["core"]
    main.multiple_evals(
        [("theirs", exported(theirs))],
        n_eval_reconstruction_batches=core["n_eval_reconstruction_batches"],
        n_eval_sparsity_variance_batches=1,
        eval_batch_size_prompts=core["batch_size_prompts"],
        compute_featurewise_density_statistics=True,
        compute_featurewise_weight_based_metrics=True,
        dataset="words",
        context_size=32,
        output_folder=str(tmp_path),
        device="cpu",
    )
    (written,) = tmp_path.glob("*.json")
    assert numbers(measured.file("full", "core")) == numbers(json.loads(written.read_text()))


def test_composition_is_that_of_sae_bench(measured: Measured, theirs: Suite) -> None:
    from sae_bench.evals.meta_structure import main

    config, sae = Suite("meta_structure", theirs.on).config(), exported(theirs)
    main.general_utils.load_and_format_sae("theirs", sae, "cpu")
    main._set_random_seed(config.random_seed)  # pyright: ignore[reportPrivateUsage] - as its command does
    output = main.run_eval_single_sae("theirs", "custom_sae", sae, config, "cpu")
    assert numbers(measured.file("full", "meta_structure")) == numbers(json.loads(output.to_json()))


def test_sae_probes_are_those_of_sae_bench(measured: Measured, theirs: Suite, tmp_path: Path) -> None:
    from sae_bench.evals.sparse_probing_sae_probes import main

    at = {"results_path": str(tmp_path / "results"), "model_cache_path": str(tmp_path / "acts")}
    config = Suite("sparse_probing_sae_probes", theirs.on).config(**at)
    found = main.run_eval(config, [("theirs", exported(theirs))], "cpu", str(tmp_path / "out"))["theirs_custom_sae"]
    assert numbers(measured.file("full", "sparse_probing_sae_probes")) == numbers(found)


def test_a_model_that_cannot_spell_is_told_so(measured: Measured) -> None:
    found = measured.file("full", "absorption")
    assert found["reason"].startswith("the model spells too little: a probe of its activations finds ")
    assert set(found) == {"reason", "f1_probe"}
    (row,) = [row for row in collect(measured.plan, measured.workspace).rows if row.arm == "full"]
    assert row.at(("absorption", "reason")) == found["reason"]
    assert row.at(("scr", "scr_metric_threshold_20")) is not None


def test_a_finished_study_takes_another_sae_for_its_own_evaluation(
    measured: Measured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(tmp_path / "workspace")
    shutil.copytree(measured.workspace.local, workspace.local)
    assert unmeasured(measured.plan, workspace) == []
    (sae,) = [sae for sae in measured.plan.saes if sae.arm == "full"]
    for name in ("scr", "tpp", "absorption", "meta_structure", "sparse_probing_sae_probes"):
        shutil.rmtree(workspace.folder(sae.apart[name]))
    killed = workspace.folder(sae.apart["scr"]) / "scratch-killed"
    killed.mkdir(parents=True)
    (killed / "half").write_text("")
    monkeypatch.setattr(suite, "hooked_model", lambda *_args, **_options: pytest.fail("what SAEs share is there"))
    result = evaluate(measured.plan, workspace)
    assert (result.failed, len(result.paths)) == ({}, 5)
    assert not list(workspace.local.rglob("scratch-*"))
    for name in ("scr", "tpp"):
        made = json.loads((workspace.folder(sae.apart[name]) / f"{name}.json").read_text())
        assert numbers(made) == numbers(measured.file("full", name)), "whether the model was measured before or just now"


def test_what_saes_share_belongs_to_the_study(measured: Measured) -> None:
    known = [found.path for found in litter(measured.workspace, [measured.plan]) if found.what == What.orphan]
    assert known == []


def test_keys_cover_settings_and_data_and_no_more(study: Study, measured: Measured) -> None:
    declared = json.loads(measured.plan.experiment.model_dump_json(exclude_unset=True))
    declared["saebench"]["tpp"]["train_set_size"] = 40
    other = make_plan(Experiment.model_validate_json(json.dumps(declared), strict=True))
    changed = {
        name
        for ours, theirs in zip(measured.plan.saes, other.saes, strict=True)
        for name in ours.apart
        if ours.apart[name].key != theirs.apart[name].key
    }
    assert changed == {"tpp"}
    assert [sae.evaluation.key for sae in measured.plan.saes] == [
        sae.evaluation.key for sae in make_plan(study.experiment).saes
    ]
    (measured.data / "words" / "more.parquet").write_bytes(b"")
    try:
        again = make_plan(measured.plan.experiment)
    finally:
        (measured.data / "words" / "more.parquet").unlink()
    assert again.saes[0].apart["core"].key != measured.plan.saes[0].apart["core"].key
    assert again.saes[0].apart["scr"].key == measured.plan.saes[0].apart["scr"].key


def test_one_that_fails_is_told_and_the_others_go_on(study: Study, measured: Measured, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path / "workspace")
    shutil.copytree(study.workspace.local, workspace.local)
    declared = json.loads(
        asking(study.experiment, measured.data, "scr", "meta_structure").model_dump_json(exclude_unset=True)
    )
    declared["saebench"]["scr"]["train_set_size"] = 4_000
    plan = make_plan(Experiment.model_validate_json(json.dumps(declared), strict=True), arms=["full"])
    result = evaluate(plan, workspace)
    assert result.failed == {"full seed 0 layer 2": "scr failed in sae-bench: AssertionError: "}
    assert [path.split("/")[1].rsplit("-", 3)[0] for path in result.paths] == ["meta_structure"]


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ('[evaluate]\nsaebench = ["absorbtion"]', "evaluate.saebench.0: should be one of 'core', 'scr', "),
        (
            "[saebench]\ntpp.trian_set_size = 3",
            "saebench: tpp.trian_set_size: unknown key; sae-bench has column1_vals_lookup, ",
        ),
        ('[saebench]\nscr.train_set_size = "many"', "saebench: scr.train_set_size: input should be a valid integer"),
        ("[saebench]\nscr.perform_scr = false", "saebench: scr.perform_scr: unknown key"),
        ('[saebench]\ndata = "nowhere"', "saebench: data: nowhere is not a folder"),
    ],
)
def test_bad_settings_are_told_in_one_line(small_toml: Path, section: str, said: str) -> None:
    text = small_toml.read_text().replace(
        "[evaluate]", section if section.startswith("[evaluate]") else f"{section}\n[evaluate]"
    )
    small_toml.write_text(text)
    with pytest.raises(BadInputError) as caught:
        Experiment.load(str(small_toml))
    assert f"{small_toml}: {said}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_told_before_anything_runs(
    study: Study, small_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    shutil.copytree(study.workspace.local, tmp_path / "workspace")
    small_toml.write_text(small_toml.read_text().replace("[evaluate]", '[evaluate]\nsaebench = ["autointerp"]'))
    ran = CliRunner().invoke(app, ["evaluate", str(small_toml), "--workspace", str(tmp_path / "workspace")])
    assert isinstance(ran.exception, BadInputError)
    assert str(ran.exception).endswith(
        "autointerp needs a key in the environment variable OPENAI_API_KEY; set it, or remove it"
    )


def test_what_runs_in_a_process_of_its_own_says_what_it_needs(
    study: Study, measured: Measured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-nobody-may-see-this")
    on = Measured(make_plan(asking(study.experiment, measured.data, "ravel")), measured.workspace, measured.data)
    for sae in on.plan.saes:
        on.workspace.folder(sae.apart["ravel"]).mkdir()
    asked: list[tuple[Any, ...]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        asked.append((command, options["input"]))
        return real(command, **options)

    real = subprocess.run
    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(EvaluationError) as caught:
        whole.ravel(on.bench("full"))
    assert str(caught.value).startswith("ravel failed in sae-bench: RuntimeError: KeyError: ")
    assert str(caught.value).endswith(
        "; it needs one of the models that sae-bench has prompts for, such as gemma-2-2b, by that name"
    )
    assert "sk-nobody" not in json.dumps(asked), "a key stays in the environment"
    assert os.environ["OPENAI_API_KEY"]


def test_a_failure_leaves_no_trace(measured: Measured) -> None:
    def fail() -> None:
        with running("core", measured.bench("full")):
            torch.manual_seed(1)
            torch.set_grad_enabled(False)
            raise ValueError("no")

    before = torch.random.get_rng_state()
    with pytest.raises(EvaluationError, match="core failed in sae-bench: ValueError: no"):
        fail()
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.is_grad_enabled()
