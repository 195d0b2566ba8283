"""Puts the probe scores of an SAE and of the model itself into SAEBench's JSON schema: `sparse_probing.json`."""

import time
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from pipeline.errors import DegenerateSAEError
from pipeline.evaluate.bench import Bench
from pipeline.evaluate.probing import POOLING_BATCH, Accuracies, by_dataset, overall
from pipeline.evaluate.tasks import Probing
from pipeline.runtime.compatibility import importing_sae_bench
from pipeline.study.plan import Plan


def compute(on: Bench) -> dict[str, Any]:
    """The content of `sparse_probing.json`. Raises DegenerateSAEError for an SAE that cannot be probed."""
    return saebench_output(on.scores.model, probed(on).scores, eval_config(on.layer.plan), on.sae_config)


def probed(on: Bench) -> Probing:
    """What the probes found. Raises DegenerateSAEError for an SAE that cannot be probed."""
    found = on.scores.sae
    if isinstance(found, DegenerateSAEError):
        raise found
    assert found is not None
    return found


def eval_config(plan: Plan) -> dict[str, Any]:
    """The fields of sae-bench's SparseProbingEvalConfig."""
    experiment = plan.experiment
    return {
        "random_seed": experiment.probes.seed,
        "dataset_names": list(plan.probes),
        "probe_train_set_size": experiment.probes.train_size,
        "probe_test_set_size": experiment.probes.test_size,
        "context_length": experiment.probes.context,
        "sae_batch_size": POOLING_BATCH,
        "llm_batch_size": experiment.store.forward_batch,
        "llm_dtype": experiment.model.dtype,
        "model_name": plan.model.name if plan.model else experiment.model.name,
        "k_values": list(experiment.evaluate.k_values),
    }


def saebench_output(
    llm: Mapping[str, Accuracies], sae: Mapping[str, Accuracies], config: Mapping[str, Any], sae_config: Mapping[str, Any]
) -> dict[str, Any]:
    """Both results as SAEBench's `sparse_probing` evaluation writes them, validated by its own classes.

    `config` holds fields of its SparseProbingEvalConfig; `sae_config` is the content of `cfg.json`.
    """
    with importing_sae_bench():
        from sae_bench.evals.sparse_probing import eval_output as schema
        from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

    def named(who: str, accuracies: Mapping[str, float]) -> dict[str, float]:
        return {_metric(who, k): accuracy for k, accuracy in accuracies.items()}

    per_dataset = {
        dataset: named("llm", by_dataset(llm)[dataset]) | named("sae", by_dataset(sae)[dataset]) for dataset in sae
    }
    per_class = {
        f"{dataset}_results": {_metric("llm", k): values for k, values in llm[dataset].items()}
        | {_metric("sae", k): values for k, values in sae[dataset].items()}
        for dataset in sae
    }
    output = schema.SparseProbingEvalOutput(
        eval_config=SparseProbingEvalConfig(**config),
        eval_id=str(uuid.uuid4()),
        datetime_epoch_millis=int(time.time() * 1000),
        eval_result_metrics=schema.SparseProbingMetricCategories(
            llm=schema.SparseProbingLlmMetrics(**named("llm", overall(llm))),
            sae=schema.SparseProbingSaeMetrics(**named("sae", overall(sae))),
        ),
        eval_result_details=[
            schema.SparseProbingResultDetail(dataset_name=f"{dataset}_results", **values)
            for dataset, values in per_dataset.items()
        ],
        eval_result_unstructured=per_class,
        sae_bench_commit_hash=f"sae-bench {version('sae-bench')}",
        sae_lens_id=str(sae_config["metadata"].get("arm", "")),
        sae_lens_release_id="direction-aware-sae",
        sae_lens_version=version("sae-lens"),
        sae_cfg_dict=dict(sae_config),
    )
    return asdict(output)


def _metric(who: str, k: str) -> str:
    return f"{who}_test_accuracy" if k == "all" else f"{who}_top_{k}_test_accuracy"
