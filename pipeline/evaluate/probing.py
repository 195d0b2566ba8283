"""Sparse probing as sae-bench does it: its pooling, its order of random numbers, its output schema.

Shapes: N documents, L tokens, D d_in, F d_sae (or D, when the residual stream itself is probed).
"""

import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from pipeline.errors import DegenerateSAEError
from pipeline.evaluate import probes
from pipeline.evaluate.probes import Features
from pipeline.runtime.compatibility import importing_sae_bench

POOLING_BATCH = 125
"""Documents read at once, and sae-bench's `sae_batch_size`."""
ENCODED_AT_ONCE = 16
"""Documents encoded at once: their latents stay in the cache, and every sum is over the same places as in a larger batch."""
Accuracies = dict[str, dict[str, float]]
"""`all` or the number of latents used, to class name, to test accuracy."""


def pool(
    batches: Iterable[tuple[str, torch.Tensor]], encode: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Features:
    """Mean features of each document over the tokens that count, of batches [N, L, D] of one class each: per class [N, F].

    A token counts when its activations do not sum to exactly 0 (sae-bench's rule; the store's padding does).
    """
    pooled: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
    for name, acts_NLD in batches:
        for some_NLD in acts_NLD.split(ENCODED_AT_ONCE):
            pooled[name].append(_mean_over_tokens(some_NLD.float(), encode))
    return {name: torch.cat(features) for name, features in pooled.items()}


def _mean_over_tokens(acts_NLD: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
    counts_NL = acts_NLD.sum(dim=2) != 0
    latents_RF = encode(acts_NLD[counts_NL]) if encode else acts_NLD[counts_NL]
    # Summed in their places among zeros, because a sum over another number of tokens would round differently.
    latents_NLF = torch.zeros(*counts_NL.shape, latents_RF.shape[1])
    latents_NLF[counts_NL] = latents_RF
    return latents_NLF.sum(dim=1) / counts_NL.sum(dim=1)[:, None]


def check_not_degenerate(dataset: str, train: Features, k_values: Sequence[int]) -> None:
    """Raise DegenerateSAEError for features that sae-bench would score without complaint, typically as exactly 0.5."""
    for name, features_NF in train.items():
        if not features_NF.isfinite().all():
            raise DegenerateSAEError(f"some features of class {name} of {dataset} are not finite")
    first_F = next(iter(train.values()))[0]
    if first_F.any() and all((features_NF == first_F).all() for features_NF in train.values()):
        raise DegenerateSAEError(f"every text of {dataset} has the same features")
    for name, features_NF in train.items():
        others_NF = torch.cat([other for key, other in train.items() if key != name])
        differing = int((features_NF.mean(dim=0) != others_NF.mean(dim=0)).sum())
        if differing == 0 and not features_NF.any():
            raise DegenerateSAEError(f"no latent fires on class {name} of {dataset}")
        if differing < max(k_values):
            raise DegenerateSAEError(
                f"only {differing} latents tell class {name} of {dataset} from the others; "
                f"a probe of {max(k_values)} needs more"
            )


def probe(datasets: Iterable[tuple[str, Features, Features]], k_values: Sequence[int], seed: int) -> dict[str, Accuracies]:
    """Train and test sae-bench's probes on the train and test features of each data set, in order.

    The random numbers are seeded once; per data set come the probe on all features, then one for each k, each of them class
    by class. That is the order of sae-bench's runs that find cached activations, so a score does not depend on what ran
    before, nor on what is probed at the same time.
    """
    generator = torch.Generator().manual_seed(seed)
    results: dict[str, Accuracies] = {}
    for dataset, train_features, test_features in datasets:
        train, test = probes.Rows.of(train_features), probes.Rows.of(test_features)
        results[dataset] = {"all": {name: probes.dense(train, test, name, generator) for name in train.of_class}}
        for k in k_values:
            results[dataset][str(k)] = {name: probes.sparse(train, test, name, k, generator) for name in train.of_class}
    return results


def by_dataset(results: Mapping[str, Accuracies]) -> dict[str, dict[str, float]]:
    """Per data set, the unweighted mean over its classes."""
    return {
        dataset: {k: sum(by_class.values()) / len(by_class) for k, by_class in accuracies.items()}
        for dataset, accuracies in results.items()
    }


def overall(results: Mapping[str, Accuracies]) -> dict[str, float]:
    """Unweighted mean over data sets of `by_dataset`."""
    means = list(by_dataset(results).values())
    return {k: sum(mean[k] for mean in means) / len(means) for k in means[0]}


def saebench_output(
    llm: Mapping[str, Accuracies], sae: Mapping[str, Accuracies], config: Mapping[str, Any], sae_config: Mapping[str, Any]
) -> dict[str, Any]:
    """Both results in the JSON schema of SAEBench's `sparse_probing` evaluation, validated by its own classes.

    `config` holds fields of its SparseProbingEvalConfig, `sae_config` what `cfg.json` says.
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
        sae_lens_id=str(sae_config["metadata"]["arm"]),
        sae_lens_release_id="direction-aware-sae",
        sae_lens_version=version("sae-lens"),
        sae_cfg_dict=dict(sae_config),
    )
    return asdict(output)


def _metric(who: str, k: str) -> str:
    return f"{who}_test_accuracy" if k == "all" else f"{who}_top_{k}_test_accuracy"
