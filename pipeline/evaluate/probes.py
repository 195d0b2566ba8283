"""Trains the probes of sae-bench, with its arithmetic and its random numbers, for several SAEs at once.

`sae_bench.evals.sparse_probing.probe_training` defines them, and tests/evaluate/test_probes.py compares bit for bit. Its
training loop draws from torch's global state, so that two SAEs cannot be probed at once. It also measures a training
accuracy in every epoch, copies the probe, and uses autograd for one linear layer. Here random numbers come from a generator,
gradients are written out, and rows are gathered when they are needed instead of copied for every probe.

F features: latents, or the d_in values of the residual stream itself.
"""

import math
import threading
from dataclasses import dataclass
from typing import Self, cast

import numpy as np
import numpy.typing as npt
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import linear

Features = dict[str, torch.Tensor]
"""Class name to features [S, F] of its documents."""

BATCH, EPOCHS, PATIENCE = 250, 100, 10
RATE, DECAY, BETA1, BETA2, EPSILON = 1e-2, 1e-2, 0.9, 0.999, 1e-8
"""The arguments of sae-bench's training loop, and torch's defaults of AdamW."""

_one_fit = threading.Lock()
"""One regression at a time: two that share OpenBLAS's one set of threads take up to eight times as long."""


@dataclass(frozen=True)
class Split:
    """The documents of one split: the features of all classes in one matrix."""

    features_SF: torch.Tensor
    of_class: dict[str, torch.Tensor]
    """Class name to the rows of its documents, int64."""

    @classmethod
    def of(cls, features: Features) -> Self:
        """From features by class."""
        counts = [len(features_SF) for features_SF in features.values()]
        indices = torch.split(torch.arange(sum(counts)), counts)
        return cls(torch.cat(list(features.values())), dict(zip(features, indices, strict=True)))

    def problem(self, name: str, generator: torch.Generator) -> "Problem":
        """A balanced problem: a class against as many documents of others.

        As `prepare_probe_data`: draw equally many documents from every other class, keep as many of them as the class has,
        and shuffle the whole.
        """
        positive, others = self.of_class[name], [rows for key, rows in self.of_class.items() if key != name]
        each = math.ceil(len(positive) / len(others))
        negative = torch.cat([rows[torch.randperm(len(rows), generator=generator)[:each]] for rows in others])
        negative = negative[torch.randperm(len(negative), generator=generator)[: len(positive)]]
        order = torch.randperm(2 * len(positive), generator=generator)
        return Problem(self, torch.cat([positive, negative])[order], order < len(positive))


@dataclass(frozen=True)
class Problem:
    """Documents of one split, and which of them a probe should tell from the others."""

    split: Split
    rows_M: torch.Tensor
    """int64: rows of the split's features."""
    positive_M: torch.Tensor
    """bool: whether each is of the class."""

    @property
    def features_MF(self) -> torch.Tensor:
        """Its features, copied."""
        return self.split.features_SF.index_select(0, self.rows_M)

    def divided(self, share: float) -> tuple["Problem", "Problem"]:
        """The first `share` of its documents, and the others: they stand in random order."""
        at = round(share * len(self.rows_M))
        return (
            Problem(self.split, self.rows_M[:at], self.positive_M[:at]),
            Problem(self.split, self.rows_M[at:], self.positive_M[at:]),
        )


def dense(train: Problem, chosen_on: Problem, test: Problem, generator: torch.Generator) -> torch.Tensor:
    """Whether a linear probe on all features is right about each test document, bool [M], after its best epoch.

    The best epoch is that of the highest accuracy on `chosen_on`; `train_probe_gpu` chooses it on the test set itself.
    """
    watched_MF, test_MF = chosen_on.features_MF, test.features_MF
    probe = LinearProbe(train.split.features_SF.shape[1], train.split.features_SF.dtype, generator)
    labels_M = train.positive_M.to(train.split.features_SF.dtype)
    right_M, best, without_gain = torch.zeros_like(test.positive_M), 0.0, 0
    for _ in range(EPOCHS):
        for batch_B in torch.split(torch.randperm(len(train.rows_M), generator=generator), BATCH):
            probe.step(train.split.features_SF.index_select(0, train.rows_M[batch_B]), labels_M[batch_B])
        accuracy = accuracy_of(probe.positive(watched_MF) == chosen_on.positive_M)
        if accuracy > best:
            right_M, best, without_gain = probe.positive(test_MF) == test.positive_M, accuracy, 0
        else:
            without_gain += 1
        if without_gain == PATIENCE:
            break
    return right_M


def accuracy_of(right_M: torch.Tensor) -> float:
    """Share of test documents about which a probe is right, rounded as sae-bench's accuracy of a dense probe."""
    return right_M.float().mean().item()


class LinearProbe:
    """One logit per document, trained by AdamW, initialised as `torch.nn.Linear`."""

    def __init__(self, width: int, dtype: torch.dtype, generator: torch.Generator):
        bound = 1 / math.sqrt(width)
        self.weight_1F = torch.empty(1, width, dtype=dtype).uniform_(-bound, bound, generator=generator)
        self.bias_1 = torch.empty(1, dtype=dtype).uniform_(-bound, bound, generator=generator)
        self.moments = [(torch.zeros_like(part), torch.zeros_like(part)) for part in (self.weight_1F, self.bias_1)]
        self.steps = 0

    def __call__(self, x_BF: torch.Tensor) -> torch.Tensor:
        """Logits [B]."""
        return linear(x_BF, self.weight_1F, self.bias_1).squeeze(-1)

    def positive(self, x_MF: torch.Tensor) -> torch.Tensor:
        """Which documents it takes for those of the class, bool [M]."""
        return torch.cat([self(x_BF) for x_BF in torch.split(x_MF, BATCH)]) > 0

    def step(self, x_BF: torch.Tensor, label_B: torch.Tensor) -> None:
        """One step on the mean binary cross-entropy."""
        error_B1 = torch.sigmoid(self(x_BF)).sub_(label_B).div_(len(label_B))[:, None]
        self.steps += 1
        rate, root = RATE / (1 - BETA1**self.steps), (1 - BETA2**self.steps) ** 0.5
        parts, gradients = (self.weight_1F, self.bias_1), (error_B1.T @ x_BF, error_B1.sum(dim=0))
        for part, gradient, (first, second) in zip(parts, gradients, self.moments, strict=True):
            part.mul_(1 - RATE * DECAY)
            first.lerp_(gradient, 1 - BETA1)
            second.mul_(BETA2).addcmul_(gradient, gradient, value=1 - BETA2)
            part.addcdiv_(first, (second.sqrt() / root).add_(EPSILON), value=-rate)


def strongest(train: Problem, k: int) -> torch.Tensor:
    """The k features whose means differ most, int64 in ascending order, as `get_top_k_mean_diff_mask`."""
    features_SF, rows_M, positive_M = train.split.features_SF, train.rows_M, train.positive_M
    difference_F = (features_SF[rows_M[positive_M]].mean(dim=0) - features_SF[rows_M[~positive_M]].mean(dim=0)).abs()
    return difference_F.argsort(descending=True)[:k].sort().values


def sparse(train: Problem, test: Problem, k: int) -> torch.Tensor:
    """Whether scikit-learn's logistic regression on the `strongest` k features is right about each test document, bool [M].

    As `train_sklearn_probe`.
    """
    used_K = strongest(train, k)
    regression = LogisticRegression(max_iter=1000)
    with _one_fit:
        regression.fit(_columns(train, used_K), train.positive_M.int().numpy())
    predicted = cast("npt.NDArray[np.int32]", regression.predict(_columns(test, used_K)))
    return torch.from_numpy(predicted).bool() == test.positive_M


def _columns(problem: Problem, used_K: torch.Tensor) -> npt.NDArray[np.float32]:
    features_SF = problem.split.features_SF
    return cast("npt.NDArray[np.float32]", features_SF[problem.rows_M[:, None], used_K].float().numpy())
