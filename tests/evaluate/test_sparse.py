"""Latents without their zeros: the same sums as with them, however many fire."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluate import sparse
from pipeline.evaluate.sparse import SparseLatents, add_pairs, stacked
from pipeline.sae.sae import SAE


def drawn(seed: int, rows: int, latents: int, share: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    f_BF = torch.randn(rows, latents, generator=generator).abs()
    return f_BF * (torch.rand(rows, latents, generator=generator) < share)


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 30), st.sampled_from([0.0, 0.05, 0.5, 1.0]))
def test_pairs_are_those_of_the_dense_products(seed: int, rows: int, latents: int, share: float) -> None:
    f_BF = drawn(seed, rows, latents, share)
    fired_BF = (f_BF > 0).float()
    block = slice(latents // 3, latents // 3 + max(1, latents // 2))
    for cost in (0, 1, 1e9):  # always sparse, by cost, never
        joint_bF = torch.zeros(len(range(latents)[block]), latents)
        strength_bF = torch.zeros_like(joint_bF)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sparse, "PAIR_COST", cost)
            patch.setattr(sparse, "DENSE_ROWS", 7)
            patch.setattr(sparse, "SMALLEST_PRODUCT", 3)
            for group in stacked([SparseLatents.of(some_BF) for some_BF in f_BF.split(5)], 20):
                add_pairs(group, block, joint_bF, strength_bF)
        # Only pairs with a latent of a higher index are asked for.
        assert torch.equal(joint_bF.triu(block.start + 1), (fired_BF[:, block].T @ fired_BF).triu(block.start + 1))
        torch.testing.assert_close(strength_bF.triu(block.start + 1), (f_BF[:, block].T @ f_BF).triu(block.start + 1))


SUMS = """
import sys, torch
from pipeline.evaluate.sparse import SparseLatents, add_pairs
f_BF = torch.rand(4096, 64, generator=torch.Generator().manual_seed(0)).sub_(0.5).relu_()
joint_bF, strength_bF = torch.zeros(64, 64), torch.zeros(64, 64)
add_pairs(SparseLatents.of(f_BF), slice(0, 64), joint_bF, strength_bF)
sys.stdout.write(strength_bF.numpy().tobytes().hex())
"""


def test_dense_sums_do_not_depend_on_the_number_of_threads() -> None:
    def sums(threads: str) -> str:
        environment = os.environ | {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        return subprocess.run(
            [sys.executable, "-c", SUMS], env=environment, capture_output=True, text=True, check=True
        ).stdout

    assert sums("1") == sums("2")


@given(st.integers(0, 2**31), st.integers(1, 20), st.sampled_from([0.0, 0.02, 0.5]))
def test_latents_come_back_and_decode_as_they_were(seed: int, rows: int, share: float) -> None:
    f_BF = drawn(seed, rows, 60, share)
    latents = SparseLatents.of(f_BF)
    assert torch.equal(latents.dense(), f_BF)
    assert torch.equal(latents.fired_F(), (f_BF > 0).sum(dim=0))
    W_dec_FD = torch.nn.functional.normalize(torch.randn(60, 7, generator=torch.Generator().manual_seed(seed)), dim=1)
    sae = SAE(W_enc_DF=W_dec_FD.T, b_enc_F=torch.zeros(60), W_dec_FD=W_dec_FD, b_dec_D=torch.ones(7))
    torch.testing.assert_close(latents.decoded(sae), sae.decode(f_BF))
