"""Synthetic activations: what the configuration says is what is drawn, in any order and on any number of cores."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError
from pipeline.evaluate.evaluation import evaluate
from pipeline.evaluate.recovery import Recovery
from pipeline.extract.estimate import describe
from pipeline.extract.extraction import extract
from pipeline.extract.synthetic_rows import DRAWN, synthetic_rows, synthetic_store
from pipeline.models.model_section import SyntheticModel
from pipeline.models.synthetic import FEATURES, NO_PARENT, GroundTruth, make_synthetic_model
from pipeline.report.collect import collect
from pipeline.report.page import write_report
from pipeline.report.terminal import results_table
from pipeline.sae.finished import open_sae
from pipeline.sae.formats import write_sae
from pipeline.store.format import Layout
from pipeline.store.reader import ActivationStore
from pipeline.study.evaluations import EVALUATIONS
from pipeline.study.experiment import Experiment
from pipeline.study.plan import Plan, make_plan
from pipeline.study.recipe import TrainConfig
from pipeline.study.status import Status
from pipeline.study.study_model import open_synthetic_model
from pipeline.train.step import Trainer
from pipeline.train.training import train

STUDY = """
description = "A synthetic study small enough for a test."

[model]
source = "synthetic"
d_in = 16
features = 40
parents = 4
children = 2
correlated_pairs = 5

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

[train.resets]
every = 20
first = 20

[study]
layers = [0]
arms = ["baseline", "full", "unweighted"]

[evaluate]
k_values = [1, 5]
"""
CONFIG = SyntheticModel(source="synthetic", d_in=16, features=40, parents=4, children=2, correlated_pairs=5)
LAYOUT = Layout(
    rows=5000, shard_rows=2048, chunk_rows=512, layers=(0,), d_in=16, dtype="float32", codec="raw",
    row_order="document", seed=3, special_ids=(0,), provenance={},
)  # fmt: skip
MANY = LAYOUT.model_copy(update={"rows": 60_000, "shard_rows": 60_000, "chunk_rows": 5000})


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    path = tmp_path / "known.toml"
    path.write_text(STUDY)
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Workspace]:
    """The study, extracted, trained and evaluated. Read only."""
    folder = tmp_path_factory.mktemp("synthetic")
    (folder / "known.toml").write_text(STUDY)
    plan, workspace = make_plan(Experiment.load(str(folder / "known.toml"))), Workspace(folder / "workspace")
    extract(plan, workspace)
    train(plan, workspace)
    evaluate(plan, workspace)
    return plan, workspace


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def drawn(truth: GroundTruth, layout: Layout, shard: int) -> tuple[torch.Tensor, torch.Tensor]:
    f, x = zip(*truth.draw(layout, shard), strict=True)
    return torch.cat(f), torch.cat(x)


def within_binomial_error(observed: torch.Tensor, probability: torch.Tensor, rows: int) -> bool:
    """Five standard deviations: over a few dozen features, one false alarm in tens of thousands of seeds."""
    return bool(((observed - probability).abs() < 5 * (probability * (1 - probability) / rows).sqrt()).all())


def test_a_shard_is_the_same_whoever_draws_it_and_after_whatever(two_threads: None) -> None:
    truth, other = GroundTruth.plant(CONFIG), GroundTruth.plant(CONFIG)
    torch.manual_seed(1)
    in_order = [drawn(truth, LAYOUT, shard) for shard in range(3)]
    torch.manual_seed(2)
    state = torch.get_rng_state()
    torch.set_num_threads(1)
    for shard in (2, 0, 1):
        for ours, theirs in zip(drawn(other, LAYOUT, shard), in_order[shard], strict=True):
            assert torch.equal(ours, theirs)
    assert torch.equal(torch.get_rng_state(), state)
    assert [len(f) for f, _ in in_order] == [2048, 2048, 904]


def test_drawing_half_a_shard_leaves_the_callers_threads_and_random_state_alone(two_threads: None) -> None:
    state = torch.get_rng_state()
    draws = GroundTruth.plant(CONFIG).draw(LAYOUT, 0)
    next(draws)
    assert torch.get_num_threads() == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_shards_chunks_and_seeds_differ() -> None:
    truth = GroundTruth.plant(CONFIG)
    first = drawn(truth, LAYOUT, 0)[1]
    assert not torch.equal(first, drawn(truth, LAYOUT, 1)[1])
    assert not torch.equal(first[:512], first[512:1024])
    assert not torch.equal(first, drawn(truth, LAYOUT.model_copy(update={"seed": 4}), 0)[1])
    assert not torch.equal(truth.direction_TD, GroundTruth.plant(CONFIG.model_copy(update={"seed": 1})).direction_TD)


def test_features_fire_as_often_and_as_strongly_as_the_configuration_says() -> None:
    truth = GroundTruth.plant(CONFIG)
    assert truth.probability_T[0].item() == pytest.approx(0.3)
    assert truth.probability_T[-1].item() == pytest.approx(0.01)
    assert truth.probability_T.diff().max() < 0
    f_BT, _ = drawn(truth, MANY, 0)
    assert within_binomial_error((f_BT > 0).double().mean(dim=0), truth.probability_T, len(f_BT))
    magnitudes = f_BT[f_BT > 0]
    assert magnitudes.mean().item() == pytest.approx(1, abs=5 * 0.2 / math.sqrt(len(magnitudes)))
    assert magnitudes.std().item() == pytest.approx(0.2, rel=0.05)


def test_children_fire_with_their_parent_and_never_without() -> None:
    truth = GroundTruth.plant(CONFIG)
    assert truth.parent_T.tolist() == [NO_PARENT] * 4 + [0, 0, 1, 1, 2, 2, 3, 3] + [NO_PARENT] * 28
    f_BT, _ = drawn(truth, MANY, 0)
    for child, parent in enumerate(truth.parent_T.tolist()):
        if parent != NO_PARENT:
            assert (f_BT[:, child] > 0).any()
            assert (f_BT[f_BT[:, child] > 0][:, parent] > 0).all()
    # Otherwise the assertions above would hold of any features at all.
    assert not (f_BT[f_BT[:, 4] > 0][:, 1] > 0).all()


@pytest.mark.parametrize("correlation", [0.8, -0.8])
def test_pairs_fire_together_more_or_less_often_than_by_chance_and_others_as_by_chance(correlation: float) -> None:
    config = CONFIG.model_copy(update={"correlation": correlation, "min_probability": 0.1, "max_probability": 0.4})
    truth = GroundTruth.plant(config)
    assert truth.pair_P2.flatten().tolist() == list(range(12, 22))
    fired_BT = (drawn(truth, MANY, 0)[0] > 0).double()
    phi_TT = torch.corrcoef(fired_BT.T)
    planted_P = phi_TT[truth.pair_P2[:, 0], truth.pair_P2[:, 1]]
    assert (planted_P.sign() == math.copysign(1, correlation)).all()
    assert planted_P.abs().min() > 10 / math.sqrt(len(fired_BT))
    independent_TT = phi_TT[22:, 22:].triu(diagonal=1)
    assert independent_TT.abs().max() < 5 / math.sqrt(len(fired_BT))


def test_directions_are_unit_and_as_similar_as_the_configuration_says() -> None:
    truth = GroundTruth.plant(CONFIG)
    assert truth.direction_TD.norm(dim=1).tolist() == pytest.approx([1.0] * 40, abs=1e-6)
    cosine_TT = truth.direction_TD @ truth.direction_TD.T
    related = [(child, parent) for child, parent in enumerate(truth.parent_T.tolist()) if parent != NO_PARENT]
    related += [(first, second) for first, second in truth.pair_P2.tolist()]
    assert [cosine_TT[pair].item() for pair in related] == pytest.approx([0.4] * 13, abs=1e-6)
    assert cosine_TT[22:, 22:].triu(diagonal=1).mean().abs() < 0.1


def test_no_sae_starts_at_the_solution_because_its_seed_is_the_models() -> None:
    truth = GroundTruth.plant(SyntheticModel(source="synthetic", d_in=64, features=256, seed=0))
    recipe = TrainConfig(d_sae=256, steps=10)
    W_dec_FD = Trainer(config=recipe, d_in=64, seed=0, device=torch.device("cpu")).finished(1.0).W_dec_FD
    assert (truth.direction_TD @ W_dec_FD.T).max() < 0.8


@settings(max_examples=10)
@given(
    st.builds(
        SyntheticModel,
        source=st.just("synthetic"),
        d_in=st.integers(2, 40),
        features=st.integers(40, 80),
        parents=st.integers(0, 5),
        children=st.integers(1, 4),
        correlated_pairs=st.integers(0, 7),
        correlation=st.floats(-0.99, 0.99),
        similarity=st.floats(0, 0.99),
        zipf_exponent=st.floats(0.1, 4),
        seed=st.integers(0, 2**31),
    )
)
def test_rows_are_the_features_directions_times_their_activations(config: SyntheticModel) -> None:
    truth = GroundTruth.plant(config)
    f_BT, x_BD = drawn(truth, LAYOUT.model_copy(update={"d_in": config.d_in}), 2)
    assert f_BT.shape == (904, config.features)
    assert f_BT.min() >= 0
    torch.testing.assert_close(x_BD.double(), f_BT.double() @ truth.direction_TD.double(), rtol=1e-5, atol=1e-5)
    child_T = (truth.parent_T != NO_PARENT).nonzero().squeeze(1)
    assert len(child_T) == config.parents * config.children
    assert not ((f_BT[:, child_T] > 0) & (f_BT[:, truth.parent_T[child_T]] == 0)).any()


def test_the_file_holds_the_whole_truth(tmp_path: Path) -> None:
    facts = make_synthetic_model(CONFIG, tmp_path)
    planted, read = GroundTruth.plant(CONFIG), GroundTruth.load(tmp_path / FEATURES)
    for name, tensor in vars(planted).items():
        assert torch.equal(getattr(read, name), tensor), name
    assert torch.equal(drawn(read, LAYOUT, 1)[0], drawn(planted, LAYOUT, 1)[0])
    assert {path.name for path in tmp_path.iterdir()} == {FEATURES}
    assert (facts["features"], facts["parents"], facts["children"], facts["correlated_pairs"]) == (40, 4, 8, 5)
    json.dumps(facts, allow_nan=False)


def test_a_store_gives_back_its_rows_and_the_features_behind_them(finished: tuple[Plan, Workspace]) -> None:
    plan, workspace = finished
    truth, store = open_synthetic_model(plan, workspace), ActivationStore(workspace.folder(plan.store))
    assert (store.rows, store.layout.shards, store.layout.layers) == (5000, 3, (0,))
    for shard in range(3):
        start, stop = store.layout.shard_range(shard)
        f_BT, x_BD = drawn(truth, store.layout, shard)
        assert torch.equal(store.read(0, start, stop), x_BD)
        assert (f_BT > 0).any()


def test_a_synthetic_store_keeps_the_rules_of_every_store(finished: tuple[Plan, Workspace]) -> None:
    plan, workspace = finished
    store = ActivationStore(workspace.folder(plan.store))
    tokens_SL, offsets, starts = store.whole("tokens"), store.whole("row_offsets"), store.whole("doc_starts")
    doc_id, sequence, position, token_id = (
        store.read_field(name, 0, store.rows) for name in ("doc_id", "sequence", "position", "token_id")
    )
    assert set(tokens_SL[:, 0]) == set(store.layout.special_ids)
    assert (tokens_SL[sequence, position] == token_id).all()
    assert set(token_id) == {DRAWN}
    assert DRAWN not in store.layout.special_ids
    row = offsets[sequence] + position - 1
    assert row.tolist() == list(range(5000))
    assert offsets[-1] >= store.rows > offsets[-2]
    flat = sequence.astype(int) * tokens_SL.shape[1] + position
    assert (starts.searchsorted(flat, side="right") - 1 == doc_id).all()


def test_bfloat16_rows_are_the_float32_rows_rounded(toml: Path) -> None:
    toml.write_text(STUDY.replace('"float32"', '"bfloat16"'))
    plan = make_plan(Experiment.load(str(toml)))
    new, truth = synthetic_store(plan), GroundTruth.plant(CONFIG)
    rows_RD = synthetic_rows(1, new.layout, new.sequences, truth).layers[0]
    assert torch.equal(rows_RD, drawn(truth, new.layout, 1)[1].bfloat16())


def test_the_study_is_whole_without_probes(finished: tuple[Plan, Workspace], tmp_path: Path) -> None:
    plan, workspace = finished
    assert (plan.probes, plan.llm_probing) == ({}, {})
    status = Status(plan, workspace)
    assert status.next_command().startswith(f"next: dasae report {plan.experiment.argument} --workspace ")
    assert status.table().row_count == 2 + 2 * 3
    assert "40 known features" in describe(plan)
    results = collect(plan, workspace)
    assert [row.arm for row in results.rows] == ["baseline", "full", "unweighted"]
    for row, sae in zip(results.rows, plan.saes, strict=True):
        assert row.degenerate is None
        assert 0 < row.at(("fvu",)) < 1
        assert 0 <= row.at(("bpcr", "union")) <= 1
        assert row.sparse_probing is row.llm_probing is None
        assert not (workspace.folder(sae.evaluation) / EVALUATIONS["sparse_probing"].file).exists()
        cfg = json.loads((workspace.folder(sae.artefact) / "cfg.json").read_text())
        assert cfg["metadata"]["model_name"] == "synthetic"
        assert "hook_name" not in cfg["metadata"]
    page = Path(write_report(results, tmp_path)).read_text()
    assert "There is no sparse probing in this study" in page
    assert "nothing here says anything about a language model" in page
    assert "Sparse probing accuracy with k latents" not in page
    assert "the model itself</th>" not in page
    titles = ["arm", "FVU", "L0", "found", "F1", "silent", "alone", "captured"]
    assert [column.header for column in results_table(results).columns] == titles


def test_recovery_is_measured_on_the_held_out_rows_and_the_features_behind_them(finished: tuple[Plan, Workspace]) -> None:
    plan, workspace = finished
    truth, store = open_synthetic_model(plan, workspace), ActivationStore(workspace.folder(plan.store))
    true_BT, x_BD = drawn(truth, store.layout, 2)
    for sae, row in zip(plan.saes, collect(plan, workspace).rows, strict=True):
        recovery = Recovery(trained := open_sae(sae.artefact, workspace), truth)
        # In chunks, as the store is read: a matrix product of another shape may round another way.
        for rows_BD, rows_BT in zip(x_BD.split(512), true_BT.split(512), strict=True):
            recovery.update(trained.encode(rows_BD), rows_BT)
        expected = recovery.compute(plan.experiment.evaluate)
        assert expected["rows"] == 904
        assert row.ground_truth
        assert row.ground_truth.model_dump() == expected
        assert 0 < expected["features"]["all"]["max_cosine"] < 1


def test_a_dead_sae_is_degenerate_without_probes_too(finished: tuple[Plan, Workspace], tmp_path: Path) -> None:
    plan, workspace = finished
    own = Workspace(shutil.copytree(workspace.root, tmp_path / "workspace"))
    dead = plan.saes[0]
    manifest = own.manifest(dead.artefact)
    assert manifest
    sae = open_sae(dead.artefact, own)
    silent = replace(sae, b_enc_F=torch.full_like(sae.b_enc_F, -1e9))
    write_sae(silent, own.folder(dead.artefact), {"arm": dead.arm})
    own.publish(dead.artefact, facts=manifest.facts)
    assert evaluate(plan, own).degenerate == {"baseline seed 0 layer 0": "no latent fires on any held-out row"}
    results = collect(plan, own)
    assert results.rows[0].degenerate == "no latent fires on any held-out row"
    assert "degenerate: no latent fires" in Path(write_report(results, tmp_path)).read_text()
    assert results_table(results).row_count == 3


def test_everything_made_once_is_not_made_again(finished: tuple[Plan, Workspace]) -> None:
    plan, workspace = finished
    assert [artefact.kind for artefact in plan.extracted] == ["models", "stores"]
    assert extract(plan, workspace) == []
    assert train(plan, workspace).made == []
    assert evaluate(plan, workspace).made == []


def test_what_is_planted_names_the_model_and_what_is_drawn_names_the_store(toml: Path) -> None:
    plan = make_plan(Experiment.load(str(toml)))
    toml.write_text(STUDY.replace("correlated_pairs = 5", "correlated_pairs = 6"))
    other_truth = make_plan(Experiment.load(str(toml)))
    toml.write_text(STUDY.replace("tokens = 5_000", "tokens = 6_000"))
    more_rows = make_plan(Experiment.load(str(toml)))
    assert plan.model
    assert other_truth.model
    assert more_rows.model
    assert plan.store.path.startswith("stores/synthetic-")
    assert len({plan.model.key, other_truth.model.key}) == 2
    assert plan.model.key == more_rows.model.key
    assert len({plan.store.key, other_truth.store.key, more_rows.store.key}) == 3


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('[corpus]\nsource = "synthetic"', '[corpus]\nsource = "python"',
         'model.source "synthetic" and corpus.source "python" do not go together'),
        ('[model]\nsource = "synthetic"\nd_in = 16\nfeatures = 40\nparents = 4\nchildren = 2\ncorrelated_pairs = 5',
         '[model]\nsource = "tiny"', 'model.source "tiny" and corpus.source "synthetic" do not go together'),
        ("[train]", "[probes]\nseed = 1\n[train]", "a synthetic model reads no texts; remove the section [probes]"),
        ("layers = [0]\ntokens", "layers = [1]\ntokens", "layer 1 does not exist, the model has layers 0 to 0"),
        ("features = 40", "features = 20", "model: features 20 are fewer than the 22 that parents, children"),
        ("features = 40", "features = 40\nmin_probability = 0.5", "0.5 is not less than max_probability 0.3"),
        ("features = 40", "features = 40\ncorrelation = 1.0", "model.correlation: input should be less than 1, got 1.0"),
        ("features = 40", "features = 40\nnoise = 0.1", "model.noise: unknown key"),
        ("features = 40", 'features = 40\nname = "x"', "model.name: unknown key"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(toml: Path, old: str, new: str, message: str) -> None:
    assert old in STUDY
    toml.write_text(STUDY.replace(old, new))
    with pytest.raises(BadInputError) as caught:
        Experiment.load(str(toml))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_a_synthetic_model_may_have_no_probes(small_toml: Path) -> None:
    text = small_toml.read_text()
    small_toml.write_text(text.replace('datasets = ["python/text-kind", "python/docstring-of"]', "datasets = []"))
    with pytest.raises(BadInputError, match=r"probes\.datasets is empty, which only a synthetic model may have"):
        Experiment.load(str(small_toml))


def test_the_shipped_study_compares_arms_that_can_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    experiment = Experiment.load("synthetic")
    assert isinstance(experiment.model, SyntheticModel)
    assert {"baseline", "full", "no-contrast", "no-contrast-l0", "orthogonal"} <= set(experiment.study.arms)
    # What the penalty must tell apart is more similar than most random directions: otherwise the mask would miss it.
    assert experiment.model.similarity * math.sqrt(experiment.model.d_in) > 1.3
    assert len({experiment.train.d_sae, experiment.model.d_in, experiment.model.features}) == 3
    assert experiment.model.features > experiment.model.d_in
