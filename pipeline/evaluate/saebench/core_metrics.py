"""Measures reconstruction, loss, sparsity and shrinkage of one SAE, as sae-bench's evaluation `core` does."""

import json
from pathlib import Path
from typing import Any, cast

import torch

from pipeline.errors import EvaluationError
from pipeline.evaluate.bench import Bench
from pipeline.evaluate.saebench.suite import Suite, running

EVERYTHING = (
    "compute_kl", "compute_ce_loss", "compute_l2_norms", "compute_sparsity_metrics", "compute_variance_metrics",
    "compute_featurewise_density_statistics", "compute_featurewise_weight_based_metrics",
)  # fmt: skip
"""What sae-bench's own command measures, whatever the defaults of its settings say."""
SHUFFLED = 42
"""The seed with which it shuffles the texts."""


def core(on: Bench) -> dict[str, Any]:
    """The content of `core.json`."""
    with running("core", on) as suite:
        return _measured(suite, suite.config(**dict.fromkeys(EVERYTHING, True)))


@torch.no_grad()
def _measured(suite: Suite, config: Any) -> dict[str, Any]:
    from sae_bench.evals.core import main

    sae, model = suite.sae(config.llm_dtype), suite.model(config.llm_dtype)
    scalars, by_latent = main.run_evals(
        sae=sae,
        activation_store=_texts(suite, config, sae, model),
        model=model,
        eval_config=config,
        ignore_tokens={model.tokenizer.pad_token_id, model.tokenizer.eos_token_id, model.tokenizer.bos_token_id},
    )
    scalars["misc_metrics"] = main.calculate_misc_metrics(by_latent)
    found = {"metrics": scalars, "feature_metrics": by_latent, "eval_cfg": config}
    found |= {"sae_id": str(suite.on.planned), "sae_set": "direction-aware-sae"}
    with suite.scratch() as folder:
        written = main.save_single_eval_result(
            main.replace_nans_with_negative_one(found), "", "", "", str(folder / "core.json"), sae
        )
        details = json.loads(Path(written).read_text(encoding="utf-8"))
    from sae_bench.evals.core import eval_output as schema

    return suite.output(
        schema.CoreEvalOutput,
        config,
        sae,
        eval_result_metrics=details["eval_result_metrics"],
        eval_result_details=details["eval_result_details"],
        eval_result_unstructured={},
    )


def _texts(suite: Suite, config: Any, sae: Any, model: Any) -> Any:
    """The tokens of the data set in sae-bench's order."""
    from datasets import load_dataset  # pyright: ignore[reportUnknownVariableType]
    from sae_lens.training.activations_store import ActivationsStore

    place = suite.on.layer.experiment.saebench.local(config.dataset)
    data = cast("Any", load_dataset)(str(place or config.dataset), split="train", streaming=True)
    if "text" not in next(iter(data)):
        raise EvaluationError(f"core: {config.dataset} has no column `text`; set saebench.core.dataset")
    texts = ActivationsStore.from_sae(model, sae, dataset=data, context_size=config.context_size)
    texts.shuffle_input_dataset(seed=SHUFFLED)
    return texts
