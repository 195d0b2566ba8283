"""Absorption beyond its gate, against sae-bench's own functions, on a model that spells a little."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.artefacts.workspace import Workspace
from pipeline.evaluate.bench import Bench, LayerBench, ProbeScores
from pipeline.evaluate.evaluation import evaluate
from pipeline.evaluate.saebench.suite import running, seed
from pipeline.extract.extraction import extract
from pipeline.runtime.compatibility import importing_sae_bench
from pipeline.sae.finished import open_sae
from pipeline.study.experiment import Experiment
from pipeline.study.plan import make_plan
from pipeline.train.training import train

MODEL = Path(__file__).parents[3] / "shared/data/models/tiny-gemma2"
STUDY = f"""
description = "Absorption on a model that spells a little."
model = {{ source = "huggingface", name = "{MODEL}", d_in = 192, depth = 6, dtype = "float32" }}
corpus = {{ source = "python" }}
store = {{ layers = [0], tokens = 9_000, context = 64, shard_rows = 4096, chunk_rows = 256 }}
probes = {{ datasets = ["python/text-kind"], train_size = 40, test_size = 20, context = 32 }}
train = {{ d_sae = 64, steps = 60, batch_size = 128, lr_warmup = 5, l1_warmup = 5, learning_rate = 3e-3, resets = false }}
study = {{ layers = [0], seeds = [0], arms = ["baseline"] }}
evaluate = {{ k_values = [1], saebench = ["absorption"], loss_tokens = 0 }}

[saebench.absorption]
max_k_value = 2
min_GT_probe_f1 = 0.05
min_feats_for_eval = 2
precalc_k_sparse_probe_sae_acts = true
k_sparse_probe_num_epochs = 5
"""


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir(), reason="the model that spells is not here: ../shared/data")
def test_it_is_that_of_sae_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spelling.toml").write_text(STUDY)
    plan, workspace = make_plan(Experiment.load(str(tmp_path / "spelling.toml"))), Workspace(tmp_path / "workspace")
    extract(plan, workspace)
    train(plan, workspace)
    assert evaluate(plan, workspace).failed == {}
    (sae,) = plan.saes
    ours = json.loads(workspace.verified(sae.apart["absorption"], "absorption.json").read_text())
    bench = LayerBench(plan, 0, workspace)
    on = Bench(bench, sae, open_sae(sae.artefact, workspace), ProbeScores(model={}, sae=None))
    with importing_sae_bench():
        from sae_bench.evals.absorption import common, feature_absorption
        from sae_bench.evals.absorption.vocab import get_alpha_tokens
    for module in (common, feature_absorption):  # sae-bench leaves the order of the words to a hash table
        monkeypatch.setattr(module, "get_alpha_tokens", lambda tokenizer: sorted(get_alpha_tokens(tokenizer)))
    theirs, expected = by_sae_bench(on, tmp_path)
    details = {detail["first_letter"]: detail for detail in ours["eval_result_details"]}
    assert len(details) > 2
    for letter, row in theirs.items():
        if letter in details:
            assert details[letter]["mean_absorption_fraction"] == row["mean_absorption_fraction"]
            assert details[letter]["full_absorption_rate"] == row["full_absorption_rate"]
            assert details[letter]["num_split_features"] == row["num_split_feats"]
    assert set(details) == {letter for letter, f1 in expected.items() if f1 > 0.05 and letter in theirs}


def by_sae_bench(on: Bench, folder: Path) -> tuple[dict[str, Any], dict[str, float]]:
    """What its command does for one SAE, in folders of the test: its own lie beside its code."""
    with running("absorption", on) as suite, torch.enable_grad():
        from sae_bench.evals.absorption import common, feature_absorption, k_sparse_probing, main

        config = suite.config()
        model, sae = suite.model(config.llm_dtype), suite.sae(config.llm_dtype)
        at = {"probes_dir": folder / "probes", "device": "cpu"}
        prompts = {"prompt_template": config.prompt_template, "prompt_token_pos": config.prompt_token_pos}
        seed(config.random_seed)
        common.train_and_save_probes(model, [0], base_template=config.prompt_template, pos_idx=config.prompt_token_pos, **at)
        seed(config.random_seed)
        letters = k_sparse_probing.run_k_sparse_probing_experiment(
            model=model,
            sae=sae,
            layer=0,
            sae_name="theirs",
            max_k_value=config.max_k_value,
            experiment_dir=folder / "k_sparse",
            f1_jump_threshold=config.f1_jump_threshold,
            k_sparse_probe_l1_decay=config.k_sparse_probe_l1_decay,
            k_sparse_probe_batch_size=config.k_sparse_probe_batch_size,
            k_sparse_probe_num_epochs=config.k_sparse_probe_num_epochs,
            precalc_k_sparse_probe_sae_acts=True,
            eval_batch_size=config.eval_k_sparse_probe_batch_size,
            **prompts,
            **at,
        )
        rows = feature_absorption.run_feature_absortion_experiment(
            model=model,
            sae=sae,
            layer=0,
            sae_name="theirs",
            max_k_value=config.max_k_value,
            experiment_dir=folder / "absorption",
            sparse_probing_experiment_dir=folder / "k_sparse",
            feature_split_f1_jump_threshold=config.f1_jump_threshold,
            batch_size=config.llm_batch_size,
            **prompts,
            **at,
        )
        found = main._aggregate_results_df(rows)  # pyright: ignore[reportPrivateUsage]
        f1 = dict(zip(letters["letter"], letters["f1_probe"], strict=True))
        return {row["letter"]: row for _, row in found.iterrows()}, f1
