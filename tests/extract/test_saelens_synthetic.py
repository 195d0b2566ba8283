"""Synthetic models that SAELens builds: the same model, rows and metrics as its own calls give, in a study of ours."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import BaseModel

from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError
from pipeline.evaluate.evaluation import evaluate
from pipeline.evaluate.synth_sae_bench import AsSAELens, Replayed, saelens_metrics
from pipeline.extract.extraction import extract
from pipeline.models import saelens_section as section
from pipeline.models.model_section import SAELensModel
from pipeline.models.saelens_model import SAELensTruth, make_saelens_model, saelens_config
from pipeline.models.synthetic import NO_PARENT
from pipeline.report.collect import collect
from pipeline.report.page import write_report
from pipeline.report.terminal import results_table
from pipeline.runtime.compatibility import importing_sae_bench
from pipeline.sae.finished import open_sae
from pipeline.sae.formats import to_saelens
from pipeline.store.reader import ActivationStore
from pipeline.study.experiment import Experiment
from pipeline.study.plan import Plan, make_plan
from pipeline.study.study_model import open_synthetic_model
from pipeline.train.training import train

with importing_sae_bench():
    import sae_lens
    import sae_lens.synthetic as saelens

STUDY = """
description = "A study of a small model that SAELens builds."

[model]
source = "saelens-synthetic"
d_in = 16
features = 40
bias = 0.5
seed = 42

[model.firing_probability]
kind = "zipfian"
exponent = 0.5
max_prob = 0.4
min_prob = 0.05

[model.hierarchy]
total_root_nodes = 3
branching_factor = [2, 3]
max_depth = 2
mutually_exclusive_portion = 1.0
compensate_probabilities = true
scale_children_by_parent = true

[model.orthogonalization]
num_steps = 3
lr = 3e-4

[model.correlation]
rank = 5
correlation_scale = 0.1

[model.mean_firing_magnitudes]
kind = "linear"
start = 5.0
end = 4.0

[model.std_firing_magnitudes]
kind = "folded_normal"
mean = 0.5
std = 0.5

[corpus]
source = "synthetic"

[store]
layers = [0]
tokens = 5_000
context = 32
dtype = "float32"
shard_rows = 2048
chunk_rows = 512

[train]
d_sae = 24
steps = 60
batch_size = 64
learning_rate = 3e-3
lr_warmup = 10
l1_warmup = 10
resets = false

[arms.bt-full]
from = "full"
question = "And on BatchTopK?"
activation = "batchtopk"
k = 4

[study]
layers = [0]
arms = ["full", "bt-full"]
seeds = [0, 1]

[evaluate]
k_values = [1]
"""

THEIRS = saelens.SyntheticModelConfig(
    num_features=40,
    hidden_dim=16,
    firing_probability=saelens.ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=0.05),
    hierarchy=saelens.HierarchyConfig(
        total_root_nodes=3,
        branching_factor=(2, 3),
        max_depth=2,
        mutually_exclusive_portion=1.0,
        compensate_probabilities=True,
        scale_children_by_parent=True,
    ),
    orthogonalization=saelens.OrthogonalizationConfig(num_steps=3, lr=3e-4),
    correlation=saelens.LowRankCorrelationConfig(rank=5, correlation_scale=0.1),
    mean_firing_magnitudes=saelens.LinearMagnitudeConfig(start=5.0, end=4.0),
    std_firing_magnitudes=saelens.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
    bias=0.5,
    seed=42,
)
"""The same model, as one would write it with SAELens."""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "bench.toml"
    path.write_text(STUDY)
    return path


@pytest.fixture
def config(toml: Path) -> SAELensModel:
    model = Experiment.load(str(toml)).model
    assert isinstance(model, SAELensModel)
    return model


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Workspace]:
    """The study, extracted, trained and evaluated. Read only."""
    folder = tmp_path_factory.mktemp("saelens")
    (folder / "bench.toml").write_text(STUDY)
    plan, workspace = make_plan(Experiment.load(str(folder / "bench.toml"))), Workspace(folder / "workspace")
    extract(plan, workspace)
    train(plan, workspace)
    evaluate(plan, workspace)
    return plan, workspace


def test_the_section_is_saelens_own_configuration(config: SAELensModel) -> None:
    assert saelens_config(config) == THEIRS


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (section.Zipfian, saelens.ZipfianFiringProbabilityConfig),
        (section.LinearProbability, saelens.LinearFiringProbabilityConfig),
        (section.RandomProbability, saelens.RandomFiringProbabilityConfig),
        (section.ConstantProbability, saelens.ConstantFiringProbabilityConfig),
        (section.ConstantMagnitude, saelens.ConstantMagnitudeConfig),
        (section.LinearMagnitude, saelens.LinearMagnitudeConfig),
        (section.ExponentialMagnitude, saelens.ExponentialMagnitudeConfig),
        (section.FoldedNormalMagnitude, saelens.FoldedNormalMagnitudeConfig),
        (section.Hierarchy, saelens.HierarchyConfig),
        (section.Orthogonalization, saelens.OrthogonalizationConfig),
        (section.LowRankCorrelation, saelens.LowRankCorrelationConfig),
    ],
)
def test_options_and_defaults_are_those_of_saelens(ours: type[BaseModel], theirs: Any) -> None:
    fields = dataclasses.fields(theirs)
    # SyntheticModel takes its own seed for the correlations and never reads theirs.
    known = {
        field.name: field.default for field in fields if (theirs, field.name) != (saelens.LowRankCorrelationConfig, "seed")
    }
    for name, field in ours.model_fields.items():
        if name != "kind":
            default = known.pop(name)
            assert field.is_required() if default is dataclasses.MISSING else field.get_default() == default
    assert not known


def test_every_option_of_the_model_is_there() -> None:
    theirs = {field.name for field in dataclasses.fields(saelens.SyntheticModelConfig)}
    ours = set(SAELensModel.model_fields) - {"source"}
    assert theirs - ours == {"num_features", "hidden_dim", "dtype"}
    assert ours - theirs == {"features", "d_in"}


def test_the_model_and_its_rows_are_those_of_saelens_own_call(config: SAELensModel, tmp_path: Path) -> None:
    facts = make_saelens_model(config, tmp_path / "model")
    read, theirs = SAELensTruth.load(tmp_path / "model"), saelens.SyntheticModel(THEIRS)
    assert torch.equal(read.direction_TD, theirs.feature_dict.feature_vectors)
    torch.manual_seed(7)
    expected_BD, expected_BT = theirs.sample_with_features(200)
    torch.manual_seed(7)
    f_BT, x_BD = read.sample(200)
    assert torch.equal(f_BT, expected_BT)
    assert torch.equal(x_BD, expected_BD)
    assert x_BD.dtype == torch.float32
    assert facts["features"] == 40
    assert facts["children"] == int((read.parent_T != NO_PARENT).sum()) > facts["parents"] > 3
    json.dumps(facts, allow_nan=False)


def test_children_fire_only_with_their_parent_and_one_at_a_time(config: SAELensModel, tmp_path: Path) -> None:
    make_saelens_model(config, tmp_path / "model")
    truth = SAELensTruth.load(tmp_path / "model")
    torch.manual_seed(0)
    fires_BT = truth.sample(5000)[0] > 0
    children = (truth.parent_T != NO_PARENT).nonzero().squeeze(1)
    assert (fires_BT[:, children].any(dim=0)).all()
    assert not (fires_BT[:, children] & ~fires_BT[:, truth.parent_T[children]]).any()
    for parent in set(map(int, truth.parent_T[children])):
        assert fires_BT[:, truth.parent_T == parent].sum(dim=1).max() == 1


def test_a_store_gives_back_its_rows_and_the_features_behind_them(finished: tuple[Plan, Workspace]) -> None:
    plan, workspace = finished
    truth, store = open_synthetic_model(plan, workspace), ActivationStore(workspace.folder(plan.store))
    assert isinstance(truth, SAELensTruth)
    for shard in (2, 0):
        f_BT, x_BD = map(torch.cat, zip(*truth.draw(store.layout, shard), strict=True))
        assert torch.equal(store.read(0, *store.layout.shard_range(shard)), x_BD)
        bias_D = truth.model.feature_dict.bias
        torch.testing.assert_close(x_BD, f_BT @ truth.direction_TD + bias_D, rtol=1e-5, atol=1e-5)


def test_metrics_are_those_of_saelens_for_the_exported_sae(finished: tuple[Plan, Workspace], tmp_path: Path) -> None:
    plan, workspace = finished
    truth, store = open_synthetic_model(plan, workspace), ActivationStore(workspace.folder(plan.store))
    assert isinstance(truth, SAELensTruth)

    def chunks() -> Iterator[torch.Tensor]:
        return (f_BT for f_BT, _ in truth.draw(store.layout, 2))

    for sae, row in zip(plan.saes, collect(plan, workspace).rows, strict=True):
        to_saelens(workspace.folder(sae.artefact), tmp_path / str(sae), str(sae))
        exported: Any = sae_lens.SAE.load_from_disk(tmp_path / str(sae))
        generator: Any = Replayed(chunks())
        expected = saelens.eval_sae_on_synthetic_data(
            exported, truth.model.feature_dict, generator, num_samples=904, batch_size=512
        ).to_dict()
        expected |= expected.pop("classification")
        assert row.synth_sae_bench
        found = row.synth_sae_bench.model_dump()
        assert found == pytest.approx(expected, rel=1e-5)
        assert 0 < found["mcc"] < 1
        assert found["explained_variance"] == pytest.approx(1 - row.at(("fvu",)), abs=1e-5)
        assert found["dead_latents"] == pytest.approx(24 * row.at(("dead_fraction",)))
        again = saelens_metrics(AsSAELens(open_sae(sae.artefact, workspace)), truth, chunks(), rows=904, chunk_rows=512)
        assert again.to_dict()["mcc"] == found["mcc"]


def test_page_and_terminal_show_saelens_metrics(finished: tuple[Plan, Workspace], tmp_path: Path) -> None:
    results = collect(*finished)
    page = Path(write_report(results, tmp_path)).read_text()
    for shown in ("SynthSAEBench", "MCC", "F1 of latents", "uniqueness", "precision", "recall", "EV", "shrinkage"):
        assert shown in page
    assert "nothing here says anything about a language model" in page
    assert [column.header for column in results_table(results).columns] == ["arm", "FVU", "L0", "MCC", "F1"]
    planned = {difference.metric for difference in results.differences if difference.planned}
    assert {"synth_sae_bench_mcc", "synth_sae_bench_f1_score"} <= planned


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("branching_factor = [2, 3]", "branching_factor = 1",
         "model.hierarchy.branching_factor: input should be greater than or equal to 2, got 1"),
        ("branching_factor = [2, 3]", "branching_factor = [3, 2]",
         "model.hierarchy: branching_factor [3, 2] begins with the larger bound; swap them"),
        ("total_root_nodes = 3", "total_root_nodes = 41",
         "model: hierarchy.total_root_nodes 41 are more than the 40 features; lower them"),
        ("mutually_exclusive_portion = 1.0", "mutually_exclusive_portion = 1.5",
         "model.hierarchy.mutually_exclusive_portion: input should be less than or equal to 1, got 1.5"),
        ("mutually_exclusive_portion = 1.0", "mutually_exclusive_min_depth = 1\nmutually_exclusive_max_depth = 0",
         "model.hierarchy: mutually_exclusive_max_depth 0 is less than mutually_exclusive_min_depth 1; swap them"),
        ("min_prob = 0.05", "min_prob = 0.5", "model.firing_probability: min_prob 0.5 is not less than max_prob 0.4"),
        ('kind = "zipfian"', 'kind = "zipf"',
         "model.firing_probability: kind should be one of 'zipfian', 'linear', 'random', 'constant', got 'zipf'"),
        ('kind = "zipfian"', 'kind = "linear"', "model.firing_probability.exponent: unknown key"),
        ('kind = "zipfian"\n', "", "model.firing_probability: 'kind' is missing"),
        ("end = 4.0", "end = -4.0", "model.mean_firing_magnitudes.end: input should be greater than 0, got -4.0"),
        ("std = 0.5", "min_value = 2.0\nmax_value = 1.0",
         "model.std_firing_magnitudes: min_value 2.0 is more than max_value 1.0; swap them"),
        ("rank = 5", "rank = 0", "model.correlation.rank: input should be greater than 0, got 0"),
        ("bias = 0.5", "bias = 0.5\nparents = 4", "model.parents: unknown key"),
        ("features = 40\n", "", "model.features: field required"),
        ('[corpus]\nsource = "synthetic"', '[corpus]\nsource = "python"',
         'model.source "saelens-synthetic" and corpus.source "python" do not go together'),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(toml: Path, old: str, new: str, message: str) -> None:
    assert old in STUDY
    toml.write_text(STUDY.replace(old, new))
    with pytest.raises(BadInputError) as caught:
        Experiment.load(str(toml))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_shipped_study_is_the_published_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    whole, small = Experiment.load("synth-sae-bench"), Experiment.load("synth-sae-bench-small")
    assert isinstance(whole.model, SAELensModel)
    assert isinstance(small.model, SAELensModel)
    # As in SAELens' docs/synth_sae_bench.md.
    published = saelens.SyntheticModelConfig(
        num_features=16_384,
        hidden_dim=768,
        firing_probability=saelens.ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
        hierarchy=saelens.HierarchyConfig(
            total_root_nodes=128,
            branching_factor=4,
            max_depth=3,
            mutually_exclusive_portion=1.0,
            mutually_exclusive_min_depth=0,
            compensate_probabilities=True,
            scale_children_by_parent=True,
        ),
        orthogonalization=saelens.OrthogonalizationConfig(num_steps=100, lr=3e-4),
        correlation=saelens.LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        mean_firing_magnitudes=saelens.LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=saelens.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        bias=0.5,
        seed=42,
    )
    assert saelens_config(whole.model) == published
    published.num_features, published.hidden_dim = small.model.features, small.model.d_in
    assert published.hierarchy
    published.hierarchy.total_root_nodes = 8
    assert saelens_config(small.model) == published
    train, study = whole.train, whole.study
    assert (train.d_sae, train.batch_size, train.learning_rate, train.lr_decay) == (4096, 1024, 3e-4, 0)
    assert 199_000_000 < train.steps * train.batch_size <= 200_000_000
    assert (len(study.seeds), {20, 25} <= set(study.sparsities), study.arms) == (5, True, small.study.arms)
