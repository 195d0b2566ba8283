"""Probing several SAEs side by side."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.errors import DegenerateSAEError, InterruptedRunError
from pipeline.evaluate import probing, tasks
from pipeline.runtime.interrupt import stop_when
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


@pytest.fixture(params=[0, 2], ids=["in sae-bench's order", "two draws"])
def of(request: pytest.FixtureRequest) -> tasks.ProbeTasks:
    documents: Any = {"d": FewDocuments(0), "e": FewDocuments(7)}
    return tasks.ProbeTasks(documents=documents, k_values=[1, 5], seed=42, draws=request.param)


def scores(of: tasks.ProbeTasks, saes: list[SAE]) -> list[tasks.Scores]:
    found = of.of_saes(saes)
    assert all(isinstance(each, tasks.Probing) for each in found)
    return [each.scores for each in found if isinstance(each, tasks.Probing)]


def test_scores_do_not_depend_on_who_is_probed_beside(of: tasks.ProbeTasks) -> None:
    saes = [sae(number) for number in range(3)]
    alone = [scores(of, [each])[0] for each in saes]
    assert scores(of, saes) == alone
    assert scores(of, saes[::-1]) == alone[::-1]
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
    assert isinstance(dead, DegenerateSAEError)
    assert str(dead) == "no latent fires on class a of d"
    assert isinstance(sound, tasks.Probing)
    assert set(sound.scores) == {"d", "e"}


def test_a_request_to_stop_is_met_at_the_next_texts(of: tasks.ProbeTasks, monkeypatch: pytest.MonkeyPatch) -> None:
    stop = threading.Event()
    encoded: list[int] = []

    def encode(self: SAE, x_RD: torch.Tensor) -> torch.Tensor:
        encoded.append(len(x_RD))
        stop.set()
        return x_RD

    monkeypatch.setattr(SAE, "encode", encode)
    monkeypatch.setattr(probing, "ENCODED_AT_ONCE", 1000)
    with stop_when(stop), pytest.raises(InterruptedRunError, match="evaluation goes on with the same command"):
        of.of_saes([sae(0)])
    assert len(encoded) == 1  # the texts in hand


def test_texts_are_read_once_however_many_saes(of: tasks.ProbeTasks) -> None:
    documents: Any = of.documents["d"]
    read: list[str] = []
    padded = documents.padded

    def counted(split: str, at_once: int) -> Any:
        read.append(split)
        return padded(split, at_once)

    documents.padded = counted
    of.of_saes([sae(number) for number in range(4)])
    assert read == ["train", "test"]


def test_as_many_at_once_as_cores_and_memory_allow(of: tasks.ProbeTasks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    each = tasks.COPIES * 4 * 270 * D_SAE
    for free, expected in ((0, 1), (3.5 * each, 3), (100 * each, 8)):
        monkeypatch.setattr(tasks, "free_memory", lambda device, free=free: free / tasks.SHARE)
        assert of.at_once(D_IN, D_SAE) == expected
    assert tasks.ProbeTasks(documents={}, k_values=[1], seed=0, draws=1).at_once(D_IN, D_SAE) == 8
