"""Latents on held-out rows: encoded once, kept while they fit, the same bits either way."""

from collections.abc import Iterator

import pytest
import torch
from small_study import Study

from pipeline.evaluate import heldout
from pipeline.evaluate.heldout import HeldoutRows, Latents
from pipeline.evaluate.sparse import BYTES_PER_FIRING
from pipeline.sae.sae import SAE
from pipeline.store.batches import rows_in_order
from pipeline.store.reader import ActivationStore


class Counted:
    """Chunks of rows, counted as they are read."""

    def __init__(self, x_BD: torch.Tensor):
        self.chunks, self.read = torch.split(x_BD, 30), 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        for x_BD in self.chunks:
            self.read += len(x_BD)
            yield x_BD


@pytest.fixture
def sae() -> SAE:
    generator = torch.Generator().manual_seed(0)
    W_dec_FD = torch.nn.functional.normalize(torch.randn(20, 6, generator=generator), dim=1)
    return SAE(W_enc_DF=W_dec_FD.T, b_enc_F=torch.full((20,), -0.5), W_dec_FD=W_dec_FD, b_dec_D=torch.ones(6))


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every call of `SAE.encode`."""
    counts: list[int] = []
    encode = SAE.encode

    def counted(self: SAE, x: torch.Tensor) -> torch.Tensor:
        counts.append(len(x))
        return encode(self, x)

    monkeypatch.setattr(SAE, "encode", counted)
    return counts


X_BD = torch.randn(100, 6, generator=torch.Generator().manual_seed(1))


def test_rows_are_read_and_encoded_once_however_often_latents_are_asked_for(sae: SAE, encoded: list[int]) -> None:
    rows = Counted(X_BD)
    latents = Latents(sae, rows)
    f_BF = torch.cat([some.dense() for _, some in latents.with_rows()])
    for _ in range(3):
        assert torch.equal(torch.cat(list(latents)), f_BF)
    assert (rows.read, sum(encoded)) == (100, 100)
    assert torch.equal(torch.cat([x_BD for x_BD, _ in latents.with_rows()]), X_BD)
    assert (rows.read, sum(encoded)) == (200, 100)


@pytest.mark.parametrize(("chunks_that_fit", "encoded_again"), [(0, 100), (2, 40), (4, 0)])
def test_what_does_not_fit_is_encoded_again_to_the_same_bits(
    sae: SAE, encoded: list[int], monkeypatch: pytest.MonkeyPatch, chunks_that_fit: int, encoded_again: int
) -> None:
    expected = torch.cat([sae.encode(x_BD) for x_BD in torch.split(X_BD, 30)])
    firing = int(expected[: 30 * chunks_that_fit].count_nonzero())
    monkeypatch.setattr(heldout, "KEPT_BYTES", BYTES_PER_FIRING * firing)
    encoded.clear()
    latents = Latents(sae, Counted(X_BD))
    for loop in range(3):
        assert torch.equal(torch.cat(list(latents)), expected)
        assert sum(encoded) == 100 + loop * encoded_again


def test_latents_that_are_not_finite_are_kept_as_they_are(sae: SAE) -> None:
    x_BD = X_BD[:2].clone()
    x_BD[0], x_BD[1] = torch.nan, torch.inf
    first, again = (torch.cat(list(latents)) for latents in [Latents(sae, [x_BD])] for _ in range(2))
    assert not first.isfinite().all()
    torch.testing.assert_close(first, again, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("share", "reads"), [(1.0, 1), (0.0, 3)])
def test_rows_are_read_once_for_all_saes_where_memory_holds_them(
    study: Study, monkeypatch: pytest.MonkeyPatch, share: float, reads: int
) -> None:
    store = ActivationStore(study.workspace.folder(study.plan.store))
    last, chunks = store.layout.shards - 1, len(list(store.chunks([store.layout.shards - 1])))
    read: list[tuple[int, int]] = []
    inner = store.read

    def counted(layer: int, start: int, stop: int) -> torch.Tensor:
        read.append((start, stop))
        return inner(layer, start, stop)

    monkeypatch.setattr(heldout, "KEPT_ROWS", share)
    monkeypatch.setattr(store, "read", counted)
    rows = HeldoutRows(store, 2, [last])
    first, *others = (torch.cat(list(rows)) for _ in range(3))
    assert len(read) == reads * chunks
    assert all(torch.equal(other, first) for other in others)
    assert torch.equal(first, torch.cat(list(rows_in_order(store, 2, [last]))))


def test_the_mean_row_is_that_of_the_held_out_shards(study: Study) -> None:
    store = ActivationStore(study.workspace.folder(study.plan.store))
    shards = [store.layout.shards - 2, store.layout.shards - 1]
    x_RD = torch.cat(list(rows_in_order(store, 2, shards)))
    torch.testing.assert_close(HeldoutRows(store, 2, shards).mean_D(), x_RD.mean(dim=0))
