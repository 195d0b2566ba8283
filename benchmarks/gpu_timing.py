"""Times and counts on a GPU, and the trainer and the rows that its benchmarks step."""

import math
import statistics
import time
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.study.recipe import TrainConfig
from pipeline.train.step import Trainer

GPU = torch.device("cuda")
D_IN, BATCH, L0 = 2304, 2048, 50
STEPS = 1_000_000
"""Total steps that schedules are told, so that none ends here."""
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def milliseconds(call: Callable[[], object], rounds: int, calls: int = 1) -> float:
    """Median over rounds of the elapsed time of one call, made `calls` times between two waits for the device."""
    call()
    taken: list[float] = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
        taken.append((time.perf_counter() - began) / calls * 1e3)
    return statistics.median(taken)


def elapsed(call: Callable[..., object], *arguments: object) -> float:
    """Seconds of one call."""
    torch.cuda.synchronize()
    began = time.perf_counter()
    call(*arguments)
    torch.cuda.synchronize()
    return time.perf_counter() - began


def counts(call: Callable[[], object]) -> tuple[int, int, float]:
    """Kernels and copies that one call launches, waits for the device, and milliseconds that the device is busy."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as measured:
        call()
        torch.cuda.synchronize()
    events = list(measured.events() or ())
    on_device = [event for event in events if event.device_type.name == "CUDA"]
    waits = sum(event.name in WAITS for event in events) - 2  # the one above and the profiler's
    return len(on_device), waits, sum(event.time_range.elapsed_us() for event in on_device) / 1e3


def rows() -> torch.Tensor:
    """A batch with E||x||^2 = 1."""
    return torch.randn(BATCH, D_IN, device=GPU) / math.sqrt(D_IN)


def trainer(d_sae: int, l0: float = L0, **changes: object) -> Trainer:
    """A Trainer on whose batches `l0` latents fire per row."""
    config = TrainConfig.model_validate(
        {"d_sae": d_sae, "steps": STEPS, "batch_size": BATCH, "contrast": None, "resets": None} | changes
    )
    made = Trainer(config=config, d_in=D_IN, seed=0, device=GPU)
    # Encoder rows of norm 0.1 on rows of norm 1: pre-activations are normal, of this deviation.
    deviation = 0.1 / math.sqrt(D_IN)
    made.weights.b_enc_F.fill_(torch.special.ndtri(torch.tensor(l0 / d_sae)).item() * deviation)
    return made
