"""Every arm on a GPU that is not there: nothing on two devices, no wait between two log lines, few kernels a step."""

import gc
import io
import weakref

import gpu_model
import pytest
import torch
from gpu_runs import D_IN, ROWS, STEPS, TRAINED, batches, recipe
from pretend_gpu import PretendedGpu

from pipeline.train.cohort import Member, train_cohort
from pipeline.train.penalty import PenaltyTerm
from pipeline.train.resets import reset_due
from pipeline.train.step import Trainer

CUDA = torch.device("cuda")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("arm", TRAINED)
def test_an_arm_trains_there_without_a_wait_and_as_on_the_cpu(arm: str, precision: str) -> None:
    config = recipe(arm, precision=precision)
    on_cpu = Trainer(config=config, d_in=D_IN, seed=0)
    for x_BD in batches():
        on_cpu.step(x_BD)
    with PretendedGpu() as gpu:
        trainer = Trainer(config=config, d_in=D_IN, seed=0, device=CUDA)
        for step, x_BD in enumerate(batches(), start=1):
            rows = x_BD.to("cuda")
            gpu.reset()
            trainer.step(rows)
            assert reset_due(step, config) or not gpu.waits, gpu.waits
        there = {name: tensor.cpu() for name, tensor in trainer.state().items()}
        again = Trainer(config=config, d_in=D_IN, seed=5, device=CUDA)
        again.load_state(there)
        assert all(torch.equal(tensor.cpu(), there[name]) for name, tensor in again.state().items())
    tolerance = {"atol": 1e-3, "rtol": 1e-3} if precision == "float32" else {"atol": 0.1, "rtol": 0.1}
    for name, tensor in on_cpu.state().items():
        if name.startswith("weights."):
            torch.testing.assert_close(there[name], tensor, **tolerance)


def test_a_penalty_on_some_steps_only_is_that_of_the_cpu() -> None:
    config = recipe("full", precision="float32", contrast={"every": 3, "pair_refresh": 3})
    on_cpu = Trainer(config=config, d_in=D_IN, seed=0)
    with PretendedGpu():
        trainer = Trainer(config=config, d_in=D_IN, seed=0, device=CUDA)
        for x_BD in batches():
            expected, measured = on_cpu.step(x_BD), trainer.step(x_BD.to("cuda"))
            for name, value in expected.terms.items():
                torch.testing.assert_close(measured.terms[name].cpu(), value, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(measured.fvu.cpu(), expected.fvu, rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(measured.l0.cpu(), expected.l0, rtol=1e-3, atol=1e-5)


OTHERS: dict[str, dict[str, object]] = {
    "topk": {"activation": "topk", "k": 4, "auxk": {"dead_after": 4 * ROWS}, "resets": None},
    "batchtopk": {"activation": "batchtopk", "k": 4, "auxk": {"dead_after": 4 * ROWS}},
    "matryoshka": {"activation": "batchtopk", "k": 4, "prefixes": [16, 64], "resets": None},
    "jumprelu": {"activation": "jumprelu", "l1": 0.01, "jumprelu": {"bandwidth": 0.05, "threshold": 0.05}},
    "quadratic": {"activation": "jumprelu", "l0_target": 4.0, "jumprelu": {"sparsity": "quadratic"}, "contrast": None},
    "steered": {"l0_target": 4.0},
    "random": {"frozen": "both", "resets": None},
    "frozen": {"frozen": "soft-decoder", "resets": None},
    "c2r": {"contrast": None, "penalty": {"kind": "c2r", "coefficient": 0.1, "chunk": 24}},
    "orthogonality": {"contrast": None, "penalty": {"kind": "orthogonality", "coefficient": 0.1, "every": 2}},
}
"""Recipes whose steps are not compiled there, or not recorded; the host may wait for the device."""


@pytest.mark.parametrize("changes", OTHERS.values(), ids=OTHERS)
def test_backbones_rivals_and_controls_train_there_as_on_the_cpu(changes: dict[str, object]) -> None:
    config = recipe("full", **changes)
    on_cpu = Trainer(config=config, d_in=D_IN, seed=0)
    with PretendedGpu():
        trainer = Trainer(config=config, d_in=D_IN, seed=0, device=CUDA)
        for x_BD in batches():
            on_cpu.step(x_BD)
            trainer.step(x_BD.to("cuda"))
        there = {name: tensor.cpu() for name, tensor in trainer.state().items()}
        finished = trainer.finished(0.5).encode(batches()[0].to("cuda")).cpu()
    for name, tensor in on_cpu.state().items():
        if name.startswith("weights."):
            torch.testing.assert_close(there[name], tensor, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(finished, on_cpu.finished(0.5).encode(batches()[0]), atol=2e-2, rtol=1e-2)


def test_an_sae_that_is_let_go_frees_its_memory_at_once() -> None:
    with PretendedGpu():
        trainer = Trainer(config=recipe("full"), d_in=D_IN, seed=0, device=CUDA)
        for x_BD in batches()[:2]:
            trainer.step(x_BD.to("cuda"))
        there = weakref.ref(trainer.weights)
        gc.disable()
        try:
            del trainer
            assert there() is None
        finally:
            gc.enable()


class Squares(PenaltyTerm):
    """A penalty that has no kernel of its own."""

    name = "squares"

    def definition(self, f_BF: torch.Tensor, W_dec_FD: torch.Tensor) -> torch.Tensor:
        """Mean square of the latents, times a norm."""
        return f_BF.square().mean() * W_dec_FD.square().mean()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_penalty_by_autograd_is_that_of_the_cpu(precision: str) -> None:
    config = recipe("full", precision=precision)
    on_cpu = Trainer(config=config, d_in=D_IN, seed=0)
    on_cpu.penalty = Squares(config.contrast, on_cpu.weights)
    with PretendedGpu():
        trainer = Trainer(config=config, d_in=D_IN, seed=0, device=CUDA)
        trainer.penalty = Squares(config.contrast, trainer.weights)
        for x_BD in batches():
            expected, measured = on_cpu.step(x_BD), trainer.step(x_BD.to("cuda"))
        there = measured.terms["squares"].cpu()
    torch.testing.assert_close(there, expected.terms["squares"], rtol=0.02, atol=0)


BUDGETS = {
    ("baseline", 2304): (34, 0.52),
    ("full", 2304): (50, 0.76),
    ("magnitude", 2304): (46, 0.76),
    ("unweighted", 2304): (48, 0.68),
    ("baseline", 16384): (34, 3.0),
    ("full", 16384): (148, 9.7),
    ("unweighted", 16384): (122, 7.4),
}
"""Most kernels, and most GB, of a step at d_in 2304 with 2,048 rows on which no thresholds are due, in bfloat16. Compiled
functions count as two kernels. On an H100 the profiler counted 34, 47, -, 45, 35, 151 and 115 (docs/performance.md)."""


@pytest.mark.parametrize(("arm", "d_sae"), BUDGETS)
def test_a_step_launches_few_kernels_that_move_little(arm: str, d_sae: int) -> None:
    gpu = gpu_model.step(arm, "bfloat16", 2304, d_sae, 2048)
    kernels, gigabytes = BUDGETS[arm, d_sae]
    assert gpu.launches <= kernels, gpu.kernels.most_common(10)
    assert gpu.bytes <= gigabytes * 1e9
    assert not gpu.waits


def test_a_cohort_is_waited_for_only_when_it_is_logged() -> None:
    with PretendedGpu() as gpu:
        members = [
            Member(trainer=Trainer(config=recipe(arm, resets=None), d_in=D_IN, seed=0, device=CUDA), log=io.StringIO())
            for arm in ("baseline", "full", "no-contrast")
        ]
        gpu.reset()
        train_cohort(members, iter(batches()), STEPS, "test")
    copies = sum(count for (what, _), count in gpu.waits.items() if what == "copy to the device")
    assert copies == STEPS  # of the batch, once for all members
    assert all(line.startswith("train/cohort.py") for (_, line) in gpu.waits)
    assert gpu.waits.total() - copies <= 8 * len(members)


def test_it_would_notice() -> None:
    with PretendedGpu() as gpu:
        x = torch.ones(3, device="cuda")
        with pytest.raises(RuntimeError, match="found cuda:0 and cpu in add"):
            x + torch.ones(3)
        with pytest.raises(TypeError, match="can't convert cuda:0"):
            x.numpy()
        gpu.reset()
        assert float((x * 2).sum()) == 6.0
        assert (gpu.launches, gpu.waits.total()) == (2, 1)
        assert x[x > 0].cpu().tolist() == [1.0] * 3
        assert {what for what, _ in gpu.waits} == {"item", "boolean index", "copy from the device"}
