"""Sparse probing as sae-bench does it: its own probe training, its order of random numbers, its output schema.

Shapes: N documents, L tokens, D d_in, F d_sae (or D, when the residual stream itself is probed).
"""

import contextlib
import io
import random
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from pipeline.compatibility import importing_sae_bench
from pipeline.errors import DegenerateSAEError

POOLING_BATCH = 125
"""Documents encoded at once, sae-bench's `sae_batch_size`; pooled sums round differently for other sizes."""

Features = dict[str, torch.Tensor]
"""Class name to one row of features per document."""
Accuracies = dict[str, dict[str, float]]
"""`all` or the number of latents used, to class name, to test accuracy."""


def pool(activations: Mapping[str, torch.Tensor], encode: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Features:
    """Mean features of each document over the tokens that count: per class [N, L, D] to [N, F].

    A token counts when its activations do not sum to exactly 0 (sae-bench's rule; the store's padding does).
    """
    features: Features = {}
    for name, acts_NLD in activations.items():
        pooled: list[torch.Tensor] = []
        for batch_NLD in acts_NLD.float().split(POOLING_BATCH):
            counts_NL = (batch_NLD.sum(dim=2) != 0).float()
            latents_NLF = encode(batch_NLD) if encode else batch_NLD
            pooled.append((latents_NLF * counts_NL[:, :, None]).sum(dim=1) / counts_NL.sum(dim=1)[:, None])
        features[name] = torch.cat(pooled)
    return features


def check_not_degenerate(dataset: str, train: Features, k_values: Sequence[int]) -> None:
    """Raise DegenerateSAEError for features that sae-bench would score without complaint, typically as exactly 0.5."""
    for name, features_NF in train.items():
        if not features_NF.isfinite().all():
            raise DegenerateSAEError(f"some features of class {name} of {dataset} are not finite")
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

    The random numbers are seeded once; per data set come the probe on all features, then one for each k. That is the order
    of sae-bench's runs that find cached activations, so a score does not depend on what ran before.
    """
    with importing_sae_bench():
        from sae_bench.evals.sparse_probing.probe_training import train_probe_on_activations

    results: dict[str, Accuracies] = {}
    python_state = random.getstate()
    with torch.random.fork_rng(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        # sae-bench passes `penalty="l2"`, the default, which newer scikit-learn wants left out.
        warnings.filterwarnings("ignore", message=".*penalty.*", category=FutureWarning)
        random.seed(seed)
        torch.manual_seed(seed)
        for dataset, train, test in datasets:
            _, accuracies = train_probe_on_activations(
                train, test, select_top_k=None, use_sklearn=False, batch_size=250, epochs=100, lr=1e-2
            )
            results[dataset] = {"all": accuracies}
            for k in k_values:
                results[dataset][str(k)] = train_probe_on_activations(train, test, select_top_k=k)[1]
    random.setstate(python_state)
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
