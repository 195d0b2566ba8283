"""Pools documents into features as sae-bench does, trains its probes on them, and decides which problems they are given.

F features: latents, or the d_in values of the residual stream itself.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch

from pipeline.errors import DegenerateSAEError
from pipeline.evaluate import probes
from pipeline.evaluate.probes import Features, Split

POOLING_BATCH = 125
"""Documents read at once, and sae-bench's `sae_batch_size`."""
ENCODED_AT_ONCE = 16
"""Documents encoded at once on a CPU: few, so that their latents stay in its cache. It changes no number."""
Accuracies = dict[str, dict[str, float]]
"""`all` or the number k of features used, to class name, to test accuracy."""
TO_TRAIN = 0.8
"""Share of a problem's training documents that a probe on all features learns from; its epoch is chosen on the others."""


@dataclass(frozen=True)
class Counted:
    """Some documents of one class: the tokens that count, and where they stand.

    A token counts unless its activations sum to exactly 0, as padding does: sae-bench's rule.
    """

    documents: int
    length: int
    place_R: torch.Tensor
    """int64: places of the tokens that count in [S, L], flattened."""
    x_RD: torch.Tensor
    """float32: their activations."""
    count_S: torch.Tensor
    """Tokens that count in each document."""

    @classmethod
    def of(cls, acts_SLD: torch.Tensor) -> Self:
        """From padded activations of any dtype."""
        acts_SLD = acts_SLD.float()
        counts_SL = acts_SLD.sum(dim=2) != 0
        place_R = counts_SL.flatten().nonzero().squeeze(1)
        x_RD = acts_SLD.flatten(0, 1).index_select(0, place_R)
        documents, length = counts_SL.shape
        return cls(documents, length, place_R, x_RD, counts_SL.sum(dim=1))

    def mean(self, latents_RF: torch.Tensor) -> torch.Tensor:
        """Means [S, F] over the tokens that count, on the CPU."""
        # The sum includes the zeros of tokens that do not count: a sum over fewer places rounds differently.
        latents_SLF = latents_RF.new_zeros(self.documents, self.length, latents_RF.shape[1])
        latents_SLF.flatten(0, 1).index_copy_(0, self.place_R, latents_RF)
        return (latents_SLF.sum(dim=1) / self.count_S[:, None]).cpu()


def parts(acts_SLD: torch.Tensor) -> list[Counted]:
    """Documents [S, L, D] in the parts that are encoded at once: on a GPU all, because small ones take longer to launch."""
    size = ENCODED_AT_ONCE if acts_SLD.device.type == "cpu" else len(acts_SLD)
    return [Counted.of(some_SLD) for some_SLD in torch.split(acts_SLD, size)]


class Pool:
    """Collects features of documents by class, [S, F]: means over their tokens. Without `encode`, of the activations."""

    def __init__(self, encode: Callable[[torch.Tensor], torch.Tensor] | None = None):
        self.encode = encode
        self._pooled: defaultdict[str, list[torch.Tensor]] = defaultdict(list)

    def update(self, name: str, documents: Sequence[Counted]) -> None:
        """Take in documents of a class."""
        for some in documents:
            self._pooled[name].append(some.mean(self.encode(some.x_RD) if self.encode else some.x_RD))

    def features(self) -> Features:
        """All that was taken in."""
        return {name: torch.cat(features) for name, features in self._pooled.items()}


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


def probe_in_order(train: Split, test: Split, k_values: Sequence[int], generator: torch.Generator) -> Accuracies:
    """Accuracies of sae-bench's probes on the features of a data set, to its bits.

    First the probe on all features, then one for each k, each of them class by class: the order of sae-bench's runs that
    find cached activations. It seeds once, before the first data set. How many numbers a probe on all features draws depends
    on the features, so that the problems after it are other ones for every SAE.
    """
    scores: Accuracies = {"all": {}}
    for name in train.of_class:
        problem, tested = train.problem(name, generator), test.problem(name, generator)
        scores["all"][name] = probes.accuracy_of(probes.dense(problem, tested, tested, generator))
    for k in k_values:
        problems = ((name, train.problem(name, generator), test.problem(name, generator)) for name in train.of_class)
        scores[str(k)] = {name: _share(probes.sparse(problem, tested, k)) for name, problem, tested in problems}
    return scores


@dataclass(frozen=True)
class Probed:
    """What the probes of a data set found."""

    accuracies: Accuracies
    """Means over the draws."""
    of_texts: dict[str, torch.Tensor]
    """By `all` or k, float64 [S]: what each test document adds to the mean accuracy over classes, which is their sum."""


def probe(dataset: str, train: Split, test: Split, k_values: Sequence[int], seed: int, draws: int) -> Probed:
    """Train and test sae-bench's probes on problems that depend on nothing but `seed`, the data set, the class and the draw.

    Every SAE is given the same problems, so that a difference between two is none of their problems. A draw decides which
    documents of other classes a class is told from, and the order of all. The probe on all features, which takes longest, is
    trained in the first draw alone.
    """
    sums: dict[str, dict[str, float]] = {k: dict.fromkeys(train.of_class, 0.0) for k in ("all", *map(str, k_values))}
    of_texts = {k: torch.zeros(len(test.features_SF), dtype=torch.float64) for k in sums}
    for draw in range(draws):
        for name in train.of_class:
            generator = torch.Generator().manual_seed(problem_seed(seed, dataset, name, draw))
            problem, tested = train.problem(name, generator), test.problem(name, generator)
            found = {str(k): (probes.sparse(problem, tested, k), draws) for k in k_values}
            if draw == 0:
                learnt, chosen_on = problem.divided(TO_TRAIN)
                found["all"] = probes.dense(learnt, chosen_on, tested, generator), 1
            for k, (right_M, of) in found.items():
                sums[k][name] += _share(right_M) / of
                of_texts[k].index_add_(0, tested.rows_M, right_M.double() / (of * len(right_M) * len(train.of_class)))
    return Probed(sums, of_texts)


def problem_seed(seed: int, dataset: str, name: str, draw: int) -> int:
    """The seed of a class's problem in one draw."""
    digest = hashlib.sha256("\0".join((str(seed), dataset, name, str(draw))).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def _share(right_M: torch.Tensor) -> float:
    return right_M.double().mean().item()


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
