"""Measures absorption of first-letter features, as sae-bench does (Chanin et al., arXiv 2409.14507).

A latent for words with an a may stay silent where a latent of one such word fires. sae-bench finds the letters' latents by
k-sparse probes, and where they are silent against a probe of the model itself. A model that cannot spell has no such probe.
"""

from collections.abc import Mapping
from statistics import mean, stdev
from typing import Any, cast

import torch

from pipeline.evaluate.bench import Bench
from pipeline.evaluate.saebench.suite import ModelSide, Suite, Tensors, running, seed
from pipeline.runtime.compatibility import importing_sae_bench

PROMPTS_AT_ONCE, EPOCHS, RATE = 64, 50, 1e-2
"""Of the probe of the model, as `train_and_save_probes`."""
SPLITS = ("train", "test")


def absorption(on: Bench) -> dict[str, Any]:
    """The content of `absorption.json`: sae-bench's output, or the reason why the model has no first-letter features."""
    with running("absorption", on) as suite:
        config = suite.config()
        return _measured(suite, config, suite.model_side(lambda side: _model_side(suite, config, side)))


def _model_side(suite: Suite, config: Any, side: ModelSide) -> dict[str, Any]:
    """Activations of every word of the vocabulary in a prompt that spells words, and a probe of their first letters."""
    from sae_bench.evals.absorption import probing, prompting, vocab

    model = suite.model(config.llm_dtype)
    seed(config.random_seed)
    train, test = probing.create_dataset_probe_training(
        vocab=_words(model),
        formatter=prompting.first_letter_formatter(),
        num_prompts_per_token=1,
        base_template=config.prompt_template,
    )
    with suite.scratch() as folder:
        train_df, test_df, x_train_ND, x_test_ND = cast("Any", probing).gen_and_save_df_acts_probing(
            model, train, test, folder, suite.hook, PROMPTS_AT_ONCE, config.prompt_token_pos
        )
        with torch.enable_grad():
            probe, data = probing.train_linear_probe_for_task(
                train_df, test_df, suite.device, x_train_ND, x_test_ND,
                num_classes=len(vocab.LETTERS), batch_size=PROMPTS_AT_ONCE, num_epochs=EPOCHS, lr=RATE,
            )  # fmt: skip
        side.write("probe", {"weight": probe.fc.weight, "bias": probe.fc.bias, **data})
    return {split: frame["token"].tolist() for split, frame in zip(SPLITS, (train_df, test_df), strict=True)}


def _words(model: Any) -> list[str]:
    """All words of the vocabulary, sorted: a tokenizer lists them in another order in every process."""
    from sae_bench.evals.absorption import vocab

    return sorted(cast("Any", vocab).get_alpha_tokens(model.tokenizer))


def _measured(suite: Suite, config: Any, side: ModelSide) -> dict[str, Any]:
    from sae_bench.evals.absorption import k_sparse_probing

    tensors = side.read(0)
    probe, labelled = _probe(tensors, suite), _labelled(tensors, side.facts, suite)
    activations, words = labelled["test"]
    spelt = _spelt(probe, activations, words, suite)
    found = [letter for letter, f1 in spelt.items() if f1 > config.min_GT_probe_f1]
    if len(found) < config.min_feats_for_eval:
        return {
            "reason": f"the model spells too little: a probe of its activations finds {len(found)} of {len(spelt)} first "
            f"letters with F1 above {config.min_GT_probe_f1:g}, and sae-bench asks for {config.min_feats_for_eval}",
            "f1_probe": spelt,
        }
    sae = suite.sae(config.llm_dtype)
    seed(config.random_seed)
    with torch.enable_grad():
        k_probes = k_sparse_probing.train_k_sparse_probes(
            sae, labelled["train"][1], labelled["train"][0], range(1, config.max_k_value + 1),
            l1_decay=config.k_sparse_probe_l1_decay, batch_size=config.k_sparse_probe_batch_size,
            num_epochs=config.k_sparse_probe_num_epochs, precalc_sae_acts=config.precalc_k_sparse_probe_sae_acts,
        )  # fmt: skip
    scores = k_sparse_probing.eval_probe_and_sae_k_sparse_raw_scores(
        sae, probe, k_probes, words, activations, config.eval_k_sparse_probe_batch_size
    )
    weights = k_sparse_probing.sae_k_sparse_metadata(sae, probe, k_probes, suite.name, suite.on.layer.layer)
    letters = k_sparse_probing.build_metrics_df(scores, weights, config.max_k_value)
    k_sparse_probing.add_feature_splits_to_metrics_df(letters, config.max_k_value, config.f1_jump_threshold)
    return _output(suite, config, sae, found, _absorbed(suite, config, sae, probe, scores, letters))


def _spelt(probe: Any, activations_ND: torch.Tensor, words: list[tuple[str, int]], suite: Suite) -> dict[str, float]:
    """F1 of the model's probe for every first letter.

    sae-bench asks this after it has trained probes on the SAE, which change nothing of it.
    """
    from sae_bench.evals.absorption.vocab import LETTERS
    from sklearn.metrics import f1_score  # pyright: ignore[reportUnknownVariableType]

    with torch.inference_mode():
        fires_NL = (probe(activations_ND.to(suite.device)).float().cpu() > 0).numpy()
    answers = [LETTERS[number] for _, number in words]
    return {
        letter: float(f1_score([answer == letter for answer in answers], fires_NL[:, column]))
        for column, letter in enumerate(LETTERS)
    }


def _probe(tensors: Tensors, suite: Suite) -> Any:
    from sae_bench.evals.absorption import common, probing

    weight_LD = tensors["weight"]
    probe = probing.LinearProbe(weight_LD.shape[1], len(weight_LD))
    probe.fc.load_state_dict({"weight": weight_LD, "bias": tensors["bias"]})
    return probe.to(device=suite.device, dtype=common.DEFAULT_DTYPE)


def _labelled(tensors: Tensors, tokens: Mapping[str, list[str]], suite: Suite) -> dict[str, Any]:
    """Activations [N, D] of each split, with the word and the number of its first letter."""
    import pandas as pd
    from sae_bench.evals.absorption import common

    with torch.inference_mode():
        return {
            # Its functions that read files unpickle them.
            split: cast("Any", common)._parse_probe_data_split(
                suite.on.layer.tokenizer,
                tensors[f"X_{split}"].to(common.DEFAULT_DTYPE),
                tensors[f"y_{split}"].tolist(),
                pd.DataFrame({"token": tokens[split]}),
            )
            for split in SPLITS
        }


def _absorbed(suite: Suite, config: Any, sae: Any, probe: Any, scores: Any, letters: Any) -> Any:
    """sae-bench's table of absorption by letter."""
    from sae_bench.evals.absorption import feature_absorption, k_sparse_probing, main, prompting

    model, layer = suite.model(config.llm_dtype), suite.on.layer.layer
    calculator = feature_absorption.FeatureAbsorptionCalculator(
        model=model,
        icl_word_list=_words(model),
        max_icl_examples=10,
        base_template=config.prompt_template,
        answer_formatter=prompting.first_letter_formatter(),
        word_token_pos=config.prompt_token_pos,
        full_absorption_probe_cos_sim_threshold=feature_absorption.FULL_ABSORPTION_PROBE_COS_THRESHOLD,
        absorption_fraction_probe_cos_sim_threshold=feature_absorption.ABSORPTION_FRACTION_PROBE_COS_THRESHOLD,
        probe_projection_proportion_threshold=feature_absorption.ABSORPTION_PROBE_PROJECTION_PROPORTION_THRESHOLD,
        absorption_fraction_max_absorbing_latents=feature_absorption.ABSORPTION_FRACTION_MAX_ABSORBING_LATENTS,
        batch_size=config.llm_batch_size,
    )
    with suite.scratch() as folder:  # where sae-bench looks for the scores
        scores.to_parquet(folder / k_sparse_probing.get_sparse_probing_raw_results_filename(suite.name, layer))
        silent = feature_absorption.get_stats_and_likely_false_negative_tokens(letters, suite.name, layer, folder)
    rows = feature_absorption.calculate_projection_and_cos_sims(calculator, sae, probe, layer, silent)
    return main._aggregate_results_df(rows)  # pyright: ignore[reportPrivateUsage] - a part of its `run_eval`


def _output(suite: Suite, config: Any, sae: Any, spelt: list[str], absorbed: Any) -> dict[str, Any]:
    with importing_sae_bench():
        from sae_bench.evals.absorption import eval_output as schema

    rows = [row for _, row in absorbed.iterrows() if row["letter"] in spelt]
    details = [
        schema.AbsorptionResultDetail(
            first_letter=row["letter"],
            mean_absorption_fraction=row["mean_absorption_fraction"],
            full_absorption_rate=row["full_absorption_rate"],
            num_full_absorption=row["num_full_absorption"],
            num_probe_true_positives=row["num_probe_true_positives"],
            num_split_features=row["num_split_feats"],
        )
        for row in rows
    ]
    fractions = [detail.mean_absorption_fraction for detail in details]
    rates = [detail.full_absorption_rate for detail in details]
    splits = [detail.num_split_features for detail in details]
    metrics = schema.AbsorptionMeanMetrics(
        mean_absorption_fraction_score=mean(fractions),
        mean_full_absorption_score=mean(rates),
        mean_num_split_features=mean(splits),
        std_dev_absorption_fraction_score=stdev(fractions),
        std_dev_full_absorption_score=stdev(rates),
        std_dev_num_split_features=stdev(splits),
    )
    categories = schema.AbsorptionMetricCategories(mean=metrics)
    return suite.output(
        schema.AbsorptionEvalOutput, config, sae, eval_result_metrics=categories, eval_result_details=details
    )
