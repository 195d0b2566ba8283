"""Every arm on a GPU that is not there: nothing on two devices, no wait between two log lines, few kernels a step."""

import io

import pytest
import torch
from gpu_runs import D_IN, STEPS, TRAINED, batches, recipe
from pretend_gpu import PretendedGpu

from pipeline.train.cohort import Member, train_cohort
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


LAUNCHES = {
    "baseline": 72,
    "full": 84,
    "magnitude": 80,
    "unweighted": 84,
}
"""Most kernels of a step on which no thresholds are due. What a GPU runs is smaller than what it takes to launch it."""


@pytest.mark.parametrize(("arm", "most"), LAUNCHES.items())
def test_a_step_launches_few_kernels(arm: str, most: int) -> None:
    with PretendedGpu() as gpu:
        trainer = Trainer(config=recipe(arm, precision="bfloat16"), d_in=D_IN, seed=0, device=CUDA)
        rows = [x_BD.to("cuda") for x_BD in batches()[:2]]
        trainer.step(rows[0])
        gpu.reset()
        trainer.step(rows[1])
    assert gpu.launches <= most, gpu.kernels.most_common(10)


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
