"""Probes as sae-bench does: pools documents into features, trains probes on them, draws random numbers in its order.

F features: latents, or the d_in values of the residual stream itself.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch

from pipeline.errors import DegenerateSAEError
from pipeline.evaluate import probes
from pipeline.evaluate.probes import Features

POOLING_BATCH = 125
"""Documents read at once, and sae-bench's `sae_batch_size`."""
ENCODED_AT_ONCE = 16
"""Documents encoded at once: few, so that their latents stay in the processor's cache. It changes no number."""
Accuracies = dict[str, dict[str, float]]
"""`all` or the number k of features used, to class name, to test accuracy."""


def pool(
    batches: Iterable[tuple[str, torch.Tensor]], encode: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Features:
    """Features of documents by class, [S, F]: means over their tokens. Each batch [S, L, D] is of one class.

    A token counts unless its activations sum to exactly 0, as padding does: sae-bench's rule.
    """
    pooled: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
    for name, acts_SLD in batches:
        for some_SLD in torch.split(acts_SLD, ENCODED_AT_ONCE):
            pooled[name].append(_mean_over_tokens(some_SLD.float(), encode))
    return {name: torch.cat(features) for name, features in pooled.items()}


def _mean_over_tokens(acts_SLD: torch.Tensor, encode: Callable[[torch.Tensor], torch.Tensor] | None) -> torch.Tensor:
    counts_SL = acts_SLD.sum(dim=2) != 0
    latents_RF = encode(acts_SLD[counts_SL]) if encode else acts_SLD[counts_SL]
    # The sum includes the zeros of tokens that do not count: a sum over fewer places rounds differently.
    latents_SLF = torch.zeros(*counts_SL.shape, latents_RF.shape[1])
    latents_SLF[counts_SL] = latents_RF
    return latents_SLF.sum(dim=1) / counts_SL.sum(dim=1)[:, None]


def check_not_degenerate(dataset: str, train: Features, k_values: Sequence[int]) -> None:
    """Raise DegenerateSAEError for features that sae-bench scores without an error, typically as exactly 0.5."""
    for name, features_SF in train.items():
        if not features_SF.isfinite().all():
            raise DegenerateSAEError(f"some features of class {name} of {dataset} are not finite")
    first_F = next(iter(train.values()))[0]
    if first_F.any() and all((features_SF == first_F).all() for features_SF in train.values()):
        raise DegenerateSAEError(f"every text of {dataset} has the same features")
    for name, features_SF in train.items():
        others_SF = torch.cat([other for key, other in train.items() if key != name])
        differing = int((features_SF.mean(dim=0) != others_SF.mean(dim=0)).sum())
        if differing == 0 and not features_SF.any():
            raise DegenerateSAEError(f"no latent fires on class {name} of {dataset}")
        if differing < max(k_values):
            raise DegenerateSAEError(
                f"only {differing} latents tell class {name} of {dataset} from the others; "
                f"a probe of {max(k_values)} needs more"
            )


def probe(datasets: Iterable[tuple[str, Features, Features]], k_values: Sequence[int], seed: int) -> dict[str, Accuracies]:
    """Train and test sae-bench's probes on the train and test features of each data set, in order.

    Random numbers are seeded once. Each data set has the probe on all features, then one for each k, each of them class by
    class: the order of sae-bench's runs that find cached activations. So a score depends neither on what ran before nor on
    what is probed at the same time.
    """
    generator = torch.Generator().manual_seed(seed)
    results: dict[str, Accuracies] = {}
    for dataset, train_features, test_features in datasets:
        train, test = probes.Split.of(train_features), probes.Split.of(test_features)
        results[dataset] = {"all": {name: probes.dense(train, test, name, generator) for name in train.of_class}}
        for k in k_values:
            results[dataset][str(k)] = {name: probes.sparse(train, test, name, k, generator) for name in train.of_class}
    return results


def by_dataset(results: Mapping[str, Accuracies]) -> dict[str, dict[str, float]]:
    """Per data set, the unweighted mean over its classes."""
    return {
        dataset: {k: _mean(by_class.values()) for k, by_class in accuracies.items()}
        for dataset, accuracies in results.items()
    }


def overall(results: Mapping[str, Accuracies]) -> dict[str, float]:
    """Unweighted mean over data sets of `by_dataset`."""
    means = list(by_dataset(results).values())
    return {k: _mean([mean[k] for mean in means]) for k in means[0]}


def _mean(values: Collection[float]) -> float:
    return sum(values) / len(values)  # not fmean, whose last bit differs from published numbers
