import contextlib
import io
import json
import random
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from pipeline.errors import DegenerateSAEError
from pipeline.evaluate import probes, probing
from pipeline.evaluate.probes import Problem, Split
from pipeline.evaluate.sparse_probing import saebench_output
from pipeline.runtime.compatibility import importing_sae_bench

CONFIG = {"model_name": "tiny", "dataset_names": ["d"], "k_values": [1, 2]}
SAE_CONFIG = {"architecture": "standard", "d_sae": 2304, "metadata": {"arm": "full"}}


def features(seed: int, rows: int = 60, width: int = 12) -> probing.Features:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(rows, width, generator=generator).relu() + shift * torch.eye(width)[index]
        for index, (name, shift) in enumerate([("a", 0.5), ("b", 2.0), ("c", 1.0)])
    }


def pooled(
    batches: Iterable[tuple[str, torch.Tensor]], encode: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> probing.Features:
    pool = probing.Pool(encode)
    for name, acts_SLD in batches:
        pool.update(name, probing.parts(acts_SLD))
    return pool.features()


def splits(*features: probing.Features) -> tuple[Split, Split]:
    train, test = map(Split.of, features)
    return train, test


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(42)


def test_pooling_is_the_mean_over_tokens_that_count() -> None:
    acts_SLD = torch.zeros(2, 4, 3)
    acts_SLD[0, 1], acts_SLD[0, 2] = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([3.0, 2.0, 1.0])
    acts_SLD[1, 1] = 5.0
    assert pooled([("a", acts_SLD)])["a"].tolist() == [[2.0, 2.0, 2.0], [5.0, 5.0, 5.0]]
    # An encoder with a bias fires on padding too, which must not count.
    biased = pooled([("a", acts_SLD)], lambda x: x[..., :1] + 10)
    assert biased["a"].tolist() == [[12.0], [15.0]]
    batches = pooled([("a", acts_SLD[:1]), ("b", acts_SLD[:1]), ("a", acts_SLD[1:])])
    assert {name: rows.tolist() for name, rows in batches.items()} == {
        "a": [[2.0, 2.0, 2.0], [5.0, 5.0, 5.0]], "b": [[2.0, 2.0, 2.0]]
    }  # fmt: skip


def test_documents_encoded_a_few_at_a_time_are_pooled_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = torch.Generator().manual_seed(0)
    acts_SLD = torch.randn(40, 24, 16, generator=drawn) * (torch.rand(40, 24, 1, generator=drawn) < 0.7)
    weights_DF = torch.randn(16, 70, generator=drawn)
    few = pooled([("a", acts_SLD)], lambda x: (x @ weights_DF).relu())["a"]
    monkeypatch.setattr(probing, "ENCODED_AT_ONCE", 1000)
    assert torch.equal(few, pooled([("a", acts_SLD)], lambda x: (x @ weights_DF).relu())["a"])


def test_numbers_are_those_of_sae_bench_called_by_hand() -> None:
    with importing_sae_bench():
        from sae_bench.evals.sparse_probing.probe_training import train_probe_on_activations

    train, test = features(0), features(1, rows=40)
    ours = probing.probe_in_order(*splits(train, test), [1, 2], generator())
    random.seed(42)
    torch.manual_seed(42)
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        _, full = train_probe_on_activations(
            train, test, select_top_k=None, use_sklearn=False, batch_size=250, epochs=100, lr=1e-2
        )
        _, top1 = train_probe_on_activations(train, test, select_top_k=1)
        _, top2 = train_probe_on_activations(train, test, select_top_k=2)
    assert ours == {"all": full, "1": top1, "2": top2}
    assert full["b"] > 0.6


def test_scores_do_not_depend_on_what_ran_before_nor_disturb_what_comes_after() -> None:
    data = splits(features(0), features(1, rows=40))
    torch.manual_seed(5)
    expected_next = torch.rand(1)
    torch.manual_seed(5)
    one = probing.probe_in_order(*data, [1], generator())
    other = probing.probe("d", *data, [1], seed=0, draws=2)
    assert torch.equal(torch.rand(1), expected_next)
    assert probing.probe_in_order(*data, [1], generator()) == one
    assert probing.probe("d", *data, [1], seed=0, draws=2).accuracies == other.accuracies


def test_every_sae_is_given_the_same_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """In sae-bench's order they differ after the first probe that stops early."""
    drawn: list[tuple[list[int], list[bool]]] = []

    def noted(train: Problem, test: Problem, k: int) -> torch.Tensor:
        drawn.extend((each.rows_M.tolist(), each.positive_M.tolist()) for each in (train, test))
        return torch.ones_like(test.positive_M)

    monkeypatch.setattr(probes, "sparse", noted)
    problems: list[list[tuple[list[int], list[bool]]]] = []
    for seed in (0, 1):
        drawn.clear()
        probing.probe("d", *splits(features(seed), features(seed + 2, rows=40)), [1, 2], seed=5, draws=2)
        problems.append(drawn.copy())
    assert problems[0] == problems[1]
    assert len({str(each) for each in problems[0]}) == 2 * 3 * 2  # splits, classes, draws; both k have the same
    in_order: list[list[tuple[list[int], list[bool]]]] = []
    for seed in (0, 1):
        drawn.clear()
        probing.probe_in_order(*splits(features(seed), features(seed + 2, rows=40)), [1], generator())
        in_order.append(drawn.copy())
    assert in_order[0] != in_order[1]


def test_what_texts_add_is_the_score(monkeypatch: pytest.MonkeyPatch) -> None:
    data = splits(features(0), features(1, rows=40))
    found = probing.probe("d", *data, [1, 2], seed=3, draws=3)
    for k, added_S in found.of_texts.items():
        assert len(added_S) == 3 * 40
        assert float(added_S.sum()) == pytest.approx(sum(found.accuracies[k].values()) / 3)
    one, two, three = (probing.probe("d", *data, [1], seed=3, draws=draws).accuracies["1"]["b"] for draws in (1, 2, 3))
    assert len({one, two, three}) > 1  # another draw is another problem
    assert found.accuracies["1"]["b"] == three


def test_the_epoch_of_a_dense_probe_is_not_chosen_on_the_test_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[int], list[int], list[int]]] = []

    def noted(train: Problem, chosen_on: Problem, test: Problem, _: torch.Generator) -> torch.Tensor:
        asked.append((train.rows_M.tolist(), chosen_on.rows_M.tolist(), test.rows_M.tolist()))
        assert chosen_on.split is train.split
        return torch.ones_like(test.positive_M)

    monkeypatch.setattr(probes, "dense", noted)
    probing.probe("d", *splits(features(0), features(1, rows=40)), [1], seed=0, draws=2)
    assert len(asked) == 3  # a class, once
    for learnt, chosen_on, _ in asked:
        assert (len(learnt), len(chosen_on)) == (96, 24)
        assert not set(learnt) & set(chosen_on)


def test_means_are_over_classes_and_then_over_data_sets() -> None:
    results = {"d": {"all": {"a": 1.0, "b": 0.5}}, "e": {"all": {"a": 0.5, "b": 0.5, "c": 0.5}}}
    assert probing.by_dataset(results) == {"d": {"all": 0.75}, "e": {"all": 0.5}}
    assert probing.overall(results) == {"all": 0.625}


def harmed(name: str) -> probing.Features:
    train = features(0)
    if name == "dead":
        return {label: torch.zeros_like(rows) for label, rows in train.items()}
    if name == "infinite":
        train["c"][0, 0] = torch.inf
    if name == "nan":
        train["b"][3, 2] = torch.nan
    if name == "constant":
        return {label: torch.ones_like(rows) for label, rows in train.items()}
    if name == "narrow":
        return {label: rows * (torch.arange(12) < 3) for label, rows in train.items()}
    return train


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dead", "no latent fires on class a of d"),
        ("nan", "features of class b of d are not finite"),
        ("infinite", "features of class c of d are not finite"),
        ("constant", "every text of d has the same features"),
        ("narrow", "only 3 latents tell class a of d from the others; a probe of 5 needs more"),
    ],
)
def test_features_that_cannot_be_scored_are_refused_and_not_called_one_half(name: str, message: str) -> None:
    with pytest.raises(DegenerateSAEError, match=message):
        probing.check_not_degenerate("d", harmed(name), [1, 5])
    probing.check_not_degenerate("d", harmed("sound"), [1, 5])


def test_the_output_has_sae_bench_s_schema() -> None:
    llm = {"d": {k: {"a": 0.9, "b": 0.8} for k in ("all", "1", "2")}}
    sae = {"d": {k: {"a": 0.7, "b": 0.6} for k in ("all", "1", "2")}}
    output = saebench_output(llm, sae, CONFIG, SAE_CONFIG)
    assert output["eval_type_id"] == "sparse_probing"
    assert output["eval_result_metrics"]["sae"]["sae_top_2_test_accuracy"] == pytest.approx(0.65)
    assert output["eval_result_metrics"]["llm"]["llm_test_accuracy"] == pytest.approx(0.85)
    assert output["eval_result_details"][0]["dataset_name"] == "d_results"
    assert output["eval_result_unstructured"]["d_results"]["sae_top_1_test_accuracy"] == {"a": 0.7, "b": 0.6}
    json.dumps(output, allow_nan=False)


def test_the_output_is_read_by_sae_bench_s_own_loaders(tmp_path: Path) -> None:
    with importing_sae_bench(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from sae_bench.evals.sparse_probing.eval_output import SparseProbingEvalOutput
        from sae_bench.sae_bench_utils import graphing_utils, testing_utils
    accuracies = {"d": {k: {"a": 0.9, "b": 0.8} for k in ("all", "1", "2")}}
    output = saebench_output(accuracies, accuracies, CONFIG, SAE_CONFIG)
    path = tmp_path / "sparse_probing" / "full_eval_results.json"
    path.parent.mkdir()
    path.write_text(json.dumps(output))
    testing_utils.validate_eval_output_format_file(str(path), SparseProbingEvalOutput)
    assert graphing_utils.find_eval_results_files([str(tmp_path)]) == [str(path)]
    read = graphing_utils.get_eval_results([str(path)])["full"]
    assert read["sae_top_2_test_accuracy"] == pytest.approx(0.85)
    assert (read["sae_class"], read["d_sae"]) == ("standard", "2k")
    (tmp_path / "bad.json").write_text(json.dumps(output | {"eval_result_metrics": {}}))
    with pytest.raises(ValidationError):
        testing_utils.validate_eval_output_format_file(str(tmp_path / "bad.json"), SparseProbingEvalOutput)


def test_a_configuration_that_is_none_is_refused() -> None:
    llm = sae = {"d": {k: {"a": 0.9, "b": 0.8} for k in ("all", "1", "2")}}
    with pytest.raises(ValidationError, match="k_values"):
        saebench_output(llm, sae, CONFIG | {"k_values": "many"}, SAE_CONFIG)
