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
from sklearn.metrics import accuracy_score  # pyright: ignore[reportUnknownVariableType]  # partly untyped
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

    def problem(self, name: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [M] of a balanced problem, a class against as many documents of others, and whether each is of the class.

        As `prepare_probe_data`: draw equally many documents from every other class, keep as many of them as the class has,
        and shuffle the whole.
        """
        positive, others = self.of_class[name], [rows for key, rows in self.of_class.items() if key != name]
        each = math.ceil(len(positive) / len(others))
        negative = torch.cat([rows[torch.randperm(len(rows), generator=generator)[:each]] for rows in others])
        negative = negative[torch.randperm(len(negative), generator=generator)[: len(positive)]]
        order = torch.randperm(2 * len(positive), generator=generator)
        return torch.cat([positive, negative])[order], order < len(positive)


def dense(train: Split, test: Split, name: str, generator: torch.Generator) -> float:
    """Best test accuracy over the epochs of a linear probe on all features, as `train_probe_gpu`."""
    rows_M, positive_M = train.problem(name, generator)
    test_M, test_positive_M = test.problem(name, generator)
    test_MF = test.features_SF.index_select(0, test_M)
    probe = LinearProbe(train.features_SF.shape[1], train.features_SF.dtype, generator)
    labels_M = positive_M.to(train.features_SF.dtype)
    best, without_gain = 0.0, 0
    for _ in range(EPOCHS):
        for batch_B in torch.split(torch.randperm(len(rows_M), generator=generator), BATCH):
            probe.step(train.features_SF.index_select(0, rows_M[batch_B]), labels_M[batch_B])
        logits_M = torch.cat([probe(x_BF) for x_BF in torch.split(test_MF, BATCH)])
        accuracy = ((logits_M > 0) == test_positive_M).float().mean().item()
        best, without_gain = (accuracy, 0) if accuracy > best else (best, without_gain + 1)
        if without_gain == PATIENCE:
            break
    return best


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


def sparse(train: Split, test: Split, name: str, k: int, generator: torch.Generator) -> float:
    """Test accuracy of scikit-learn's logistic regression on the k features whose means differ most.

    As `get_top_k_mean_diff_mask` and `train_sklearn_probe`.
    """
    rows_M, positive_M = train.problem(name, generator)
    test_M, test_positive_M = test.problem(name, generator)
    features_SF = train.features_SF
    difference_F = (features_SF[rows_M[positive_M]].mean(dim=0) - features_SF[rows_M[~positive_M]].mean(dim=0)).abs()
    used_K = difference_F.argsort(descending=True)[:k].sort().values
    regression = LogisticRegression(max_iter=1000)
    with _one_fit:
        regression.fit(_columns(train, rows_M, used_K), positive_M.int().numpy())
    return float(accuracy_score(test_positive_M.int().numpy(), regression.predict(_columns(test, test_M, used_K))))


def _columns(split: Split, rows_M: torch.Tensor, used_K: torch.Tensor) -> npt.NDArray[np.float32]:
    return cast("npt.NDArray[np.float32]", split.features_SF[rows_M[:, None], used_K].float().numpy())
