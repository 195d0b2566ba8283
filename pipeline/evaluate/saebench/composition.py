"""Measures composition as sae-bench's `meta_structure`: how well a smaller SAE, trained on the decoder, explains it."""

from typing import Any

import torch

from pipeline.evaluate.bench import Bench
from pipeline.evaluate.saebench.suite import running, seed


def meta_structure(on: Bench) -> dict[str, Any]:
    """The content of `meta_structure.json`. sae-bench trains in float32 whatever the model's dtype is."""
    with running("meta_structure", on) as suite:
        from sae_bench.evals.meta_structure import main
        from sae_bench.evals.meta_structure.eval_output import MetaStructureEvalOutput

        config = suite.config()
        sae = suite.sae(config.dtype)
        seed(config.random_seed)
        with torch.enable_grad():
            result = main.run_eval_single_sae("direction-aware-sae", suite.name, sae, config, str(suite.device))
        return suite.output(
            MetaStructureEvalOutput,
            config,
            sae,
            eval_result_metrics=result.eval_result_metrics,
            eval_result_details=[],
        )
