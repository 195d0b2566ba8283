"""The pages that are examples: their blocks are run as they stand, in order."""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_store import filled, numbered
from small_study import SMALL, Study

from pipeline import Experiment, Workspace, make_plan, read_results
from pipeline.errors import BadInputError
from pipeline.evaluate.evaluation import evaluate
from pipeline.evaluate.reconstruction import METRICS
from pipeline.report import metrics
from pipeline.report.collect import collect
from pipeline.report.final_info import final_info
from pipeline.report.page import write_report
from pipeline.report.results import Results
from pipeline.sae.activations import ACTIVATIONS
from pipeline.sae.finished import export_sae, open_sae
from pipeline.sae.formats import read_sae, write_sae
from pipeline.store.codecs import CODECS
from pipeline.study.arms import ARMS
from pipeline.study.evaluations import EVALUATIONS
from pipeline.study.origins import ORIGINS
from pipeline.study.penalties import PENALTIES
from pipeline.study.plan import TRAINING_LOG
from pipeline.study.status import Status
from pipeline.texts.corpus import corpus_texts
from pipeline.texts.files import READERS
from pipeline.train.training import train

ROOT = Path(__file__).parents[1]


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
def own(study: Study, tmp_path: Path) -> Workspace:
    """A copy of the small study's workspace, to be changed."""
    return Workspace(shutil.copytree(study.workspace.root, tmp_path / "workspace"))


def write(study: Study, workspace: Workspace) -> None:
    write_report(collect(study.plan, workspace), workspace.report(study.experiment.name))


def test_the_quickstart_runs(study: Study, own: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    write(study, own)
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


@pytest.fixture
def tables() -> Iterator[None]:
    """The tables that docs/extending.md adds to, afterwards as they were."""
    dicts: list[dict[str, Any]] = [ARMS, ACTIVATIONS, PENALTIES, ORIGINS, EVALUATIONS, METRICS, READERS, CODECS]
    before, shown = [dict(table) for table in dicts], list(metrics.METRICS)
    yield
    for table, entries in zip(dicts, before, strict=True):
        table.clear()
        table.update(entries)
    metrics.METRICS[:] = shown


@pytest.fixture
def extended(tables: None) -> None:
    """Everything that docs/extending.md adds."""
    for block in blocks("extending.md", "python"):
        assert len(block.strip().splitlines()) < 20
        exec(compile(block, "extending.md", "exec"), {"__name__": "extending"})


def test_an_arm_is_added(extended: None, small_toml: Path) -> None:
    declared, _, _, _ = blocks("extending.md", "toml")
    text = SMALL.replace('"full", "magnitude"]', '"full", "sparser", "sparser-late", "few-pairs"]')
    small_toml.write_text(text + declared)
    recipes = {sae.arm: sae.recipe for sae in make_plan(Experiment.load(str(small_toml))).to_train}
    assert recipes["sparser"] == recipes["full"].model_copy(update={"l1": 0.06})
    assert recipes["sparser-late"].l1 == 0.06
    assert (recipes["sparser-late"].resets.first, recipes["few-pairs"].contrast.topk) == (2000, 0.01)


def test_evaluations_of_sae_bench_are_asked_for(small_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    *_, asked = blocks("extending.md", "toml")
    (tmp_path / "data-sets").mkdir()
    monkeypatch.chdir(tmp_path)
    before = make_plan(Experiment.load(str(small_toml))).saes[0]
    small_toml.write_text(SMALL.partition("[evaluate]")[0] + asked)
    (sae, *_) = make_plan(Experiment.load(str(small_toml))).saes
    assert sae.evaluation.key == before.evaluation.key
    assert set(sae.apart) - set(before.apart) == {"core", "scr", "meta_structure"}
    assert sae.apart["scr"].inputs["settings"] == {"train_set_size": 1000, "test_set_size": 250}


def test_an_activation_and_a_penalty_are_added(extended: None, own: Workspace, small_toml: Path, tmp_path: Path) -> None:
    _, declared, _, _ = blocks("extending.md", "toml")
    small_toml.write_text(SMALL.replace('"full", "magnitude"]', '"full", "crowding", "absolute"]') + declared)
    plan = make_plan(Experiment.load(str(small_toml)))
    crowding, absolute = (next(sae for sae in plan.saes if sae.arm == arm) for arm in ("crowding", "absolute"))
    assert train(plan, own).made == [crowding, absolute]
    log = (own.folder(crowding.artefact) / TRAINING_LOG).read_text()
    terms = [json.loads(line)["crowding"] for line in log.splitlines()]
    assert all(term > 0 for term in terms)
    sae, x_BD = open_sae(absolute.artefact, own), torch.randn(3, 64)
    f_BF = sae.encode(x_BD)
    torch.testing.assert_close(f_BF, ((x_BD - sae.b_dec_D) @ sae.W_enc_DF + sae.b_enc_F).abs())
    with pytest.raises(BadInputError, match="SAELens does not know the architecture absolute"):
        export_sae(own.folder(absolute.artefact), tmp_path / "exported")
    assert evaluate(plan, own).made == [crowding, absolute]
    assert [row.arm for row in collect(plan, own).rows] == ["baseline", "full", "crowding", "absolute"]


def test_an_evaluation_is_added(extended: None, study: Study, own: Workspace) -> None:
    full = next(sae for sae in study.plan.saes if sae.arm == "full")
    shutil.rmtree(own.folder(full.evaluation))
    assert evaluate(study.plan, own).made == [full]
    write(study, own)
    ranks = read_results(study.experiment, own)["rank_effective"]
    expected = torch.linalg.svdvals(open_sae(full.artefact, own).W_dec_FD)
    assert ranks[1] == pytest.approx(float(expected.sum() ** 2 / expected.square().sum()), rel=1e-5)
    assert list(ranks.isna()) == [True, False, True]
    assert '<div id="rank"><dt>Rank</dt>' in own.report("small").read("index.html").decode()


def test_a_source_of_saes_is_added(
    extended: None, study: Study, own: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "layer2").mkdir()
    export_sae(own.folder(study.plan.saes[1].artefact), tmp_path / "layer2" / "theirs")
    plan = make_plan(study.experiment)
    assert plan.to_train == study.plan.to_train
    (theirs,) = plan.from_outside
    assert Status(plan, own).next_command().startswith(f"next: dasae train {study.experiment.argument} --workspace ")
    assert train(plan, own).made == [theirs]
    assert train(plan, own).made == []
    assert evaluate(plan, own).made == [theirs]
    assert Status(plan, own).next_command().startswith("next: dasae report ")
    ours = plan.saes[1]
    measured = [
        json.loads(own.verified(sae.evaluation, EVALUATIONS["reconstruction"].file).read_text())["fvu"]
        for sae in (ours, theirs)
    ]
    assert measured[0] == measured[1]
    results = collect(plan, own)
    assert [row.arm for row in results.rows] == ["baseline", "full", "magnitude", "theirs"]
    assert not any("theirs" in (difference.arm, difference.reference) for difference in results.differences)
    write_report(results, own.report("small"))
    # Weights of its own, a key of its own.
    folder = tmp_path / "layer2" / "theirs"
    sae = read_sae(folder)
    write_sae(replace(sae, W_enc_DF=sae.W_enc_DF[:32], W_dec_FD=sae.W_dec_FD[:, :32], b_dec_D=sae.b_dec_D[:32]), folder, {})
    (changed,) = make_plan(study.experiment).from_outside
    assert changed.artefact.key != theirs.artefact.key
    assert train(make_plan(study.experiment), own).failed == {
        str(changed): "it reads rows of 32 numbers, the model's rows have 64; remove it"
    }
    assert own.manifest(changed.artefact) is None


def test_a_metric_is_added(extended: None, study: Study, own: Workspace) -> None:
    for artefact in [sae.evaluation for sae in study.plan.saes if sae.arm != "magnitude"]:
        shutil.rmtree(own.folder(artefact))
    evaluate(study.plan, own)
    write(study, own)
    results = read_results(study.experiment, own)
    baseline, full, older = results["dense_fraction"]
    assert 0 <= baseline <= 1
    assert 0 <= full <= 1
    assert older != older  # it was evaluated before there was such a metric
    differences = read_results(study.experiment, own, "differences")
    assert len(differences[differences["metric"] == "dense_fraction"]) > 0
    report = own.report("small")
    page = report.read("index.html").decode()
    assert page.count('<a class="term" href="#dense">dense</a>') == 4  # main table, two references, all SAEs
    assert '<div id="dense"><dt>Dense</dt>' in page
    rows = json.loads(report.read("results.json"))["rows"]
    assert [row.get("dense_fraction") for row in rows] == [baseline, full, None]
    (info,) = final_info(Results.model_validate_json(report.read("results.json"))).values()
    assert info["final_info_dict"]["dense_fraction"] == [baseline, full, None]


def test_a_corpus_source_is_added(extended: None, small_toml: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.csv").write_text('id,text\n1,"one, two"\n2,three\n')
    (tmp_path / "other.csv").write_text("id,body\n1,x\n")
    files = f'source = "files"\npaths = ["{tmp_path}/texts.csv"]'
    small_toml.write_text(SMALL.replace('source = "python"', files))
    experiment = Experiment.load(str(small_toml))
    assert list(corpus_texts(experiment.corpus)) == ["one, two", "three"]
    assert make_plan(experiment).store.label == "tiny-gemma2-files"
    small_toml.write_text(small_toml.read_text().replace("texts.csv", "other.csv"))
    with pytest.raises(BadInputError, match=r"other\.csv has no column 'text'"):
        list(corpus_texts(Experiment.load(str(small_toml)).corpus))


def test_a_codec_is_added(extended: None, small_toml: Path, tmp_path: Path) -> None:
    small_toml.write_text(SMALL.replace("[store]", '[store]\ncodec = "zstd"'))
    assert Experiment.load(str(small_toml)).store.codec == "zstd"
    store = filled(tmp_path / "store", numbered(200), codec="zstd")
    assert store.bytes < filled(tmp_path / "raw", numbered(200)).bytes
    assert torch.equal(store.read(3, 0, 200), numbered(200))
    assert store._direct["layer_03"] is not None
