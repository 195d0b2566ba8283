"""Our probes against the functions of sae-bench that they stand for: the same bits, and the same random numbers drawn."""

import contextlib
import io
import warnings
from typing import Any

import pytest
import torch

from pipeline.evaluate import probes
from pipeline.runtime.compatibility import importing_sae_bench

SHAPES = [(60, 40, 12, 3), (130, 31, 48, 2), (201, 100, 333, 4)]
"""Rows per class to train on and to test with, features, classes."""


@pytest.fixture(scope="module")
def stock() -> Any:
    with importing_sae_bench():
        from sae_bench.evals.sparse_probing import probe_training
    return probe_training


def features(seed: int, rows: int, width: int, classes: int) -> probes.Features:
    """Sparse ones that tell the classes apart, but not well."""
    generator = torch.Generator().manual_seed(seed)
    return {
        str(index): (torch.randn(rows, width, generator=generator) + 0.8 * (torch.arange(width) % classes == index)).relu()
        for index in range(classes)
    }


@pytest.fixture(params=SHAPES, ids=str)
def splits(request: pytest.FixtureRequest) -> tuple[probes.Features, probes.Features]:
    train, test, width, classes = request.param
    return features(0, train, width, classes), features(1, test, width, classes)


def both_seeded(seed: int) -> torch.Generator:
    """Seeds torch's global state, which sae-bench draws from, and a generator for us."""
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def test_problems_are_those_of_prepare_probe_data(stock: Any, splits: tuple[probes.Features, probes.Features]) -> None:
    for seed in range(3):
        generator, train = both_seeded(seed), probes.Split.of(splits[0])
        for name in splits[0]:
            expected, labels = stock.prepare_probe_data(splits[0], name, False)
            problem = train.problem(name, generator)
            assert torch.equal(problem.features_MF, expected)
            assert torch.equal(problem.positive_M.int(), labels)
        assert torch.equal(generator.get_state(), torch.get_rng_state())


@pytest.mark.parametrize("seed", [0, 1, 42])
def test_probes_on_all_features_are_those_of_train_probe_gpu(
    stock: Any, splits: tuple[probes.Features, probes.Features], seed: int
) -> None:
    train, test = splits
    generator, rows = both_seeded(seed), (probes.Split.of(train), probes.Split.of(test))
    for name in train:
        with contextlib.redirect_stdout(io.StringIO()):
            problem = (*stock.prepare_probe_data(train, name, False), *stock.prepare_probe_data(test, name, False))
            _, expected = stock.train_probe_gpu(*problem, dim=problem[0].shape[1], batch_size=250, epochs=100, lr=1e-2)
        problem, tested = (split.problem(name, generator) for split in rows)
        assert probes.accuracy_of(probes.dense(problem, tested, tested, generator)) == expected
        # Every epoch draws, so that this is also the number of epochs.
        assert torch.equal(generator.get_state(), torch.get_rng_state())
        assert expected > 0.55


def test_weights_after_many_steps_are_those_of_autograd_and_adamw() -> None:
    width = 333
    generator = both_seeded(5)
    linear = torch.nn.Linear(width, 1)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=1e-2)
    probe = probes.LinearProbe(width, torch.float32, generator)
    for rows in [250, 152] * 40:
        x_BF = torch.randn(rows, width, generator=generator).relu()
        label_B = (x_BF[:, 0] > x_BF[:, 1]).float()
        loss = torch.nn.BCEWithLogitsLoss()(linear(x_BF).squeeze(-1), label_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        probe.step(x_BF, label_B)
    assert torch.equal(probe.weight_1F, linear.weight)
    assert torch.equal(probe.bias_1, linear.bias)


@pytest.mark.parametrize("k", [1, 5, 12])
def test_sparse_probes_are_those_of_sae_bench(stock: Any, splits: tuple[probes.Features, probes.Features], k: int) -> None:
    train, test = splits
    generator, rows = both_seeded(k), (probes.Split.of(train), probes.Split.of(test))
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        _, expected = stock.train_probe_on_activations(train, test, select_top_k=k)
    found: dict[str, float] = {}
    for name in train:
        problem, tested = (split.problem(name, generator) for split in rows)
        found[name] = probes.sparse(problem, tested, k).double().mean().item()
    assert found == expected
    assert torch.equal(generator.get_state(), torch.get_rng_state())
