"""sae-bench's probes, with its arithmetic and its random numbers and without what nobody reads.

What `sae_bench.evals.sparse_probing.probe_training` computes, and `tests/evaluate/test_probes.py` compares bit for bit. Its
training loop also measures the training accuracy of every epoch, copies the probe and asks autograd for the gradient of one
linear layer; it draws from torch's global state, so that no two SAEs could be probed at once. Here numbers come from a
generator, gradients are written out, and rows are gathered when they are needed instead of being copied for every probe.

Shapes: N rows of features, M rows of a problem, B rows of a batch, F features, k of them used.
"""

import math
import threading
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score
from torch.nn.functional import linear

Features = dict[str, torch.Tensor]
"""Class name to one row of features per document."""

BATCH, EPOCHS, PATIENCE = 250, 100, 10
RATE, DECAY, BETA1, BETA2, EPSILON = 1e-2, 1e-2, 0.9, 0.999, 1e-8
"""Settings with which sae-bench calls its training loop, and torch's defaults of AdamW."""


_one_fit = threading.Lock()
"""One regression at a time: OpenBLAS has one set of threads, and two that ask for them took up to eight times as long."""


@dataclass(frozen=True)
class Rows:
    """The features of one split: all classes below each other, and which rows are whose."""

    features_NF: torch.Tensor
    of_class: dict[str, torch.Tensor]

    @classmethod
    def of(cls, features: Features) -> "Rows":
        """From features by class."""
        counts = [len(features_NF) for features_NF in features.values()]
        indices = torch.arange(sum(counts)).split(counts)
        return cls(torch.cat(list(features.values())), dict(zip(features, indices, strict=True)))

    def problem(self, name: str, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows [M] of a balanced problem, a class against equally many of all others, and whether each is of the class.

        As `prepare_probe_data`: as many of every other class, of those as many as the class has, all shuffled.
        """
        positive, others = self.of_class[name], [rows for key, rows in self.of_class.items() if key != name]
        each = math.ceil(len(positive) / len(others))
        negative = torch.cat([rows[torch.randperm(len(rows), generator=generator)[:each]] for rows in others])
        negative = negative[torch.randperm(len(negative), generator=generator)[: len(positive)]]
        order = torch.randperm(2 * len(positive), generator=generator)
        return torch.cat([positive, negative])[order], order < len(positive)


def dense(train: Rows, test: Rows, name: str, generator: torch.Generator) -> float:
    """Best test accuracy over the epochs of a linear probe on all features, as `train_probe_gpu`."""
    rows_M, positive_M = train.problem(name, generator)
    test_M, test_positive_M = test.problem(name, generator)
    test_MF = test.features_NF.index_select(0, test_M)
    probe = _Probe(train.features_NF.shape[1], train.features_NF.dtype, generator)
    labels_M = positive_M.to(train.features_NF.dtype)
    best, without_gain = 0.0, 0
    for _ in range(EPOCHS):
        for batch_B in torch.randperm(len(rows_M), generator=generator).split(BATCH):
            probe.step(train.features_NF.index_select(0, rows_M[batch_B]), labels_M[batch_B])
        logits_M = torch.cat([probe(x_BF) for x_BF in test_MF.split(BATCH)])
        accuracy = ((logits_M > 0) == test_positive_M).float().mean().item()
        best, without_gain = (accuracy, 0) if accuracy > best else (best, without_gain + 1)
        if without_gain == PATIENCE:
            break
    return best


class _Probe:
    """One logit per row, trained by AdamW; initialised as `torch.nn.Linear`."""

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


def sparse(train: Rows, test: Rows, name: str, k: int, generator: torch.Generator) -> float:
    """Test accuracy of scikit-learn's logistic regression on the k features whose means differ most.

    As `get_top_k_mean_diff_mask` and `train_sklearn_probe`.
    """
    rows_M, positive_M = train.problem(name, generator)
    test_M, test_positive_M = test.problem(name, generator)
    features_NF = train.features_NF
    difference_F = (features_NF[rows_M[positive_M]].mean(dim=0) - features_NF[rows_M[~positive_M]].mean(dim=0)).abs()
    used_k = difference_F.argsort(descending=True)[:k].sort().values
    regression = LogisticRegression(max_iter=1000)
    with _one_fit:
        regression.fit(_columns(train, rows_M, used_k), positive_M.int().numpy())
    return float(accuracy_score(test_positive_M.int().numpy(), regression.predict(_columns(test, test_M, used_k))))


def _columns(rows: Rows, rows_M: torch.Tensor, used_k: torch.Tensor) -> np.ndarray:
    return rows.features_NF[rows_M[:, None], used_k].float().numpy()
