"""Probing several SAEs side by side."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.errors import DegenerateSAEError
from pipeline.evaluate import tasks
from pipeline.sae.sae import SAE

D_IN, D_SAE, CLASSES = 8, 40, ("a", "b", "c")


class FewDocuments:
    """Documents of three classes, as `Documents` yields them."""

    def __init__(self, seed: int):
        self.store = SimpleNamespace(whole=lambda name: torch.zeros(3 * 90))
        self.seed = seed

    def padded(self, split: str, at_once: int) -> Any:
        generator = torch.Generator().manual_seed(self.seed + (split == "test"))
        for index, name in enumerate(CLASSES):
            x_SLD = torch.randn(60 if split == "train" else 30, 12, D_IN, generator=generator)
            yield name, x_SLD + 0.4 * (torch.arange(D_IN) % 3 == index)


def sae(seed: int, bias: float = 0.0) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    W_dec_FD = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=generator), dim=1)
    return SAE(
        W_enc_DF=W_dec_FD.T.contiguous(), b_enc_F=torch.full((D_SAE,), bias), W_dec_FD=W_dec_FD, b_dec_D=torch.zeros(D_IN)
    )


@pytest.fixture
def of() -> tasks.ProbeTasks:
    documents: Any = {"d": FewDocuments(0), "e": FewDocuments(7)}
    return tasks.ProbeTasks(documents=documents, k_values=[1, 5], seed=42)


def test_scores_do_not_depend_on_who_is_probed_beside(of: tasks.ProbeTasks) -> None:
    saes = [sae(number) for number in range(3)]
    alone = [of.of_saes([each])[0].result() for each in saes]
    assert [future.result() for future in of.of_saes(saes)] == alone
    assert [future.result() for future in of.of_saes(saes[::-1])] == alone[::-1]
    assert alone[0] != alone[1]
    assert alone[0]["d"]["all"].keys() == set(CLASSES)


def test_probing_leaves_random_state_and_threads_as_they_were(of: tasks.ProbeTasks) -> None:
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    of.of_saes([sae(0), sae(1)])
    of.of_model()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_a_degenerate_sae_is_refused_and_its_neighbour_scored(of: tasks.ProbeTasks) -> None:
    dead, sound = of.of_saes([sae(0, bias=-1e3), sae(0)])
    with pytest.raises(DegenerateSAEError, match="no latent fires on class a of d"):
        dead.result()
    assert set(sound.result()) == {"d", "e"}


def test_an_interruption_stops_what_is_being_probed(of: tasks.ProbeTasks, monkeypatch: pytest.MonkeyPatch) -> None:
    started, encoded, interrupted = threading.Event(), [], threading.Event()

    def encode(self: SAE, x_RD: torch.Tensor) -> torch.Tensor:
        started.set()
        assert interrupted.wait(10)
        encoded.append(len(x_RD))
        return x_RD

    def wait(futures: object) -> None:
        started.wait(10)
        threading.Timer(0.2, interrupted.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(SAE, "encode", encode)
    monkeypatch.setattr(tasks, "wait", wait)
    with pytest.raises(KeyboardInterrupt):
        of.of_saes([sae(0)])
    of.threads.shutdown()
    assert len(encoded) == 1  # the one in hand


def test_as_many_at_once_as_cores_and_memory_allow(of: tasks.ProbeTasks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    each = tasks.COPIES * 4 * 270 * D_SAE
    for free, expected in ((0, 1), (3.5 * each, 3), (100 * each, 8)):
        monkeypatch.setattr(tasks, "free_memory", lambda device, free=free: free / tasks.SHARE)
        assert of.at_once(D_SAE) == expected
    assert tasks.ProbeTasks(documents={}, k_values=[1], seed=0).at_once(D_SAE) == 8
