"""A training step on one GPU: the card's ceilings, our steps in every manner, and those of other trainers."""

import sys
import types
from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from gpu_timing import BATCH, D_IN, GPU, L0, STEPS, counts, milliseconds, rows, trainer
from measure import show
from torch.profiler import ProfilerActivity, profile

from pipeline.runtime import compiled
from pipeline.runtime.compatibility import importing_sae_bench
from pipeline.runtime.precision import tensor_cores
from pipeline.study.penalties import Contrast
from pipeline.train import on_gpu
from pipeline.train.pair_selection import thresholds
from pipeline.train.step import Trainer
from pipeline.train.weights import decoder_norms

WIDTHS = (2304, 16384)
Step = Callable[[torch.Tensor], object]
MANNERS = ("as written", "compiled", "recorded")
"""Operation by operation; what lies between products compiled; and the whole step replayed as a CUDA graph."""


def ceilings() -> None:
    """What the card can do at best."""
    lines: list[list[str]] = []
    for name, dtype, tf32 in (
        ("float32", torch.float32, False), ("TF32", torch.float32, True), ("bfloat16", torch.bfloat16, False)
    ):  # fmt: skip
        torch.backends.cuda.matmul.allow_tf32 = tf32
        a, b = (torch.randn(8192, 8192, device=GPU, dtype=dtype) for _ in range(2))
        lines.append([f"product, {name}", f"{2 * 8192**3 / milliseconds(lambda a=a, b=b: a @ b, 5, 3) / 1e9:.0f} TFLOP/s"])
    torch.backends.cuda.matmul.allow_tf32 = False
    source, to = (torch.empty(2**31, dtype=torch.uint8, device=GPU) for _ in range(2))
    rate = 2**32 / milliseconds(lambda: to.copy_(source), 5) / 1e6
    lines.append(["copy on the device, read and written", f"{rate:.0f} GB/s"])
    pageable = torch.zeros(BATCH, D_IN)
    pinned = pageable.pin_memory()
    batch = torch.empty(BATCH, D_IN, device=GPU)
    for name, host in (("pageable", pageable), ("pinned", pinned)):
        rate = host.nbytes / milliseconds(lambda host=host: batch.copy_(host, non_blocking=True), 5, 10) / 1e6
        lines.append([f"a batch to the device, {name}", f"{rate:.1f} GB/s"])
    show(torch.cuda.get_device_name(), ["", "at best"], lines)


@contextmanager
def stepping(manner: str) -> Generator[None]:
    """Inside the block, steps are taken in this manner."""
    plain_steps, can_compile = compiled.PLAIN_CALLS, compiled.can_compile
    compiled.PLAIN_CALLS = plain_steps if manner == "recorded" else STEPS
    if manner == "as written":
        compiled.can_compile = lambda: False
    try:
        with tensor_cores(GPU):
            yield
    finally:
        compiled.PLAIN_CALLS, compiled.can_compile = plain_steps, can_compile


def steps() -> None:
    """One step of each kind in each manner, and the thresholds."""
    bfloat16: dict[str, object] = {"precision": "bfloat16", "contrast": {"pair_refresh": STEPS, "precision": "bfloat16"}}
    recipes: dict[str, dict[str, object]] = {
        "vanilla, float32": {},
        "vanilla, bfloat16": {"precision": "bfloat16"},
        "contrast, float32": {"contrast": {"pair_refresh": STEPS}},
        "contrast, bfloat16": bfloat16,
        "unweighted, bfloat16": bfloat16 | {"contrast": {"weighted": False, "precision": "bfloat16", "pair_refresh": STEPS}},
    }
    lines: list[list[str]] = []
    for d_sae in WIDTHS:
        for name, changes in recipes.items():
            for manner in MANNERS:
                with stepping(manner):
                    torch.cuda.reset_peak_memory_stats()
                    made, x_BD = trainer(d_sae, L0, **changes), on_gpu.batch(rows())[0]
                    call = lambda made=made, x_BD=x_BD: made.step(x_BD)  # noqa: E731 - two uses
                    for _ in range(compiled.PLAIN_CALLS % STEPS + 1):
                        call()
                    launches, waits, busy = counts(call)
                    taken = milliseconds(call, 5, 20 if d_sae == WIDTHS[0] else 5)
                share = 10 * BATCH * D_IN * d_sae / (taken / 1e3) / 757e12
                numbers = f"{taken:.3f}", f"{busy:.3f}", f"{launches:,}", f"{waits}", f"{share:.1%}"
                lines.append([f"{name}, F {d_sae}, {manner}", *numbers, f"{torch.cuda.max_memory_allocated() / 1e6:,.0f}"])
                del made, call
        with tensor_cores(GPU):
            kept = trainer(d_sae, contrast={}).weights.W_dec_FD
            launches, waits, busy = counts(lambda kept=kept: thresholds(kept, decoder_norms(kept), Contrast()))
            taken = milliseconds(lambda kept=kept: thresholds(kept, decoder_norms(kept), Contrast()), 3)
        lines.append([f"thresholds, F {d_sae}", f"{taken:.3f}", f"{busy:.3f}", f"{launches:,}", f"{waits}", "", ""])
    columns = ["a step of", "ms", "device busy ms", "kernels", "waits", "products of 757 TFLOP/s", "peak MB"]
    show(f"Training steps, d_in {D_IN}, batch {BATCH}", columns, lines)


def kernels() -> None:
    """What a recorded step of an arm under the contrast spends its time on."""
    for d_sae in WIDTHS:
        with tensor_cores(GPU):
            made = trainer(d_sae, L0, precision="bfloat16", contrast={"pair_refresh": STEPS, "precision": "bfloat16"})
            x_BD, _ = on_gpu.batch(rows())
            for _ in range(compiled.PLAIN_CALLS + 2):
                made.step(x_BD)
            torch.cuda.synchronize()
            with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as measured:
                made.step(x_BD)
                torch.cuda.synchronize()
        taken: dict[str, list[float]] = {}
        for event in measured.events() or ():
            if event.device_type.name == "CUDA":
                taken.setdefault(event.name, []).append(event.time_range.elapsed_us())
        ordered = sorted(taken.items(), key=lambda item: -sum(item[1]))
        lines = [[name[:100], f"{len(times)}", f"{sum(times):.1f}"] for name, times in ordered]
        show(f"Kernels of a step under the contrast, F {d_sae}", ["", "times", "us"], lines)


def repeat() -> None:
    """Whether the GPU gives the same bits twice, and how far it is from the CPU after 30 steps of a small SAE."""
    lines: list[list[str]] = []
    for name, changes, l0 in (
        ("vanilla", {}, L0), ("contrast by blocks", {"contrast": {}}, 200), ("contrast by rows", {"contrast": {}}, 8)
    ):  # fmt: skip
        options = {"lr_warmup": 0, "l1_warmup": 0} | changes
        batches = [rows().cpu() for _ in range(30)]
        states: list[torch.Tensor] = []
        for device in (GPU, GPU, torch.device("cpu")):
            made = trainer(2304, l0, **options)
            moved = Trainer(config=made.config, d_in=D_IN, seed=0, device=device)
            moved.weights.b_enc_F.copy_(made.weights.b_enc_F)
            with tensor_cores(device):
                for x_BD in batches:
                    moved.step(x_BD.to(device))
            states.append(moved.weights.W_dec_FD.cpu())
        first, second, on_cpu = states
        moved_by = (on_cpu - trainer(2304, l0, **options).weights.W_dec_FD.cpu()).norm()
        lines.append([name, str(torch.equal(first, second)), f"{float((first - on_cpu).norm() / moved_by):.1e}"])
    show("30 steps of an SAE", ["", "same bits twice", "distance to the CPU's, of the way gone"], lines)


def dictionary_learning(d_sae: int) -> Step:
    """`StandardTrainer.update`, as its own training loop calls it."""
    # Only its activation buffers, which are not used here, need nnsight.
    sys.modules.setdefault("nnsight", types.SimpleNamespace(LanguageModel=object))  # pyright: ignore[reportArgumentType]
    from dictionary_learning.trainers.standard import StandardTrainer

    theirs = StandardTrainer(steps=STEPS, activation_dim=D_IN, dict_size=d_sae, layer=0, lm_name="", device="cuda")
    state = iter(range(STEPS))
    return lambda x_BD: theirs.update(next(state), x_BD)


def saelens(d_sae: int, *, autocast: bool) -> Step:
    """SAELens' `SAETrainer.step` on a standard SAE, without its logging."""
    with importing_sae_bench():
        from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

    config = SAETrainerConfig(
        total_training_samples=STEPS * BATCH, train_batch_size_samples=BATCH, lr_end=3e-5, autocast=autocast, device="cuda",
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    sae = StandardTrainingSAE(StandardTrainingSAEConfig(d_in=D_IN, d_sae=d_sae, l1_coefficient=0.04, device="cuda"))
    return SAETrainer(cfg=config, sae=sae, data_provider=iter(())).step


def peers() -> None:
    """Other trainers' steps beside ours, in turn on the same batch."""
    lines: list[list[str]] = []
    for d_sae in WIDTHS:
        made: dict[str, Callable[[], Step]] = {
            "ours, float32": lambda d_sae=d_sae: trainer(d_sae).step,
            "ours, bfloat16": lambda d_sae=d_sae: trainer(d_sae, precision="bfloat16").step,
            "dictionary_learning, float32": lambda d_sae=d_sae: dictionary_learning(d_sae),
            "SAELens, float32": lambda d_sae=d_sae: saelens(d_sae, autocast=False),
            "SAELens, autocast": lambda d_sae=d_sae: saelens(d_sae, autocast=True),
        }
        x_BD = rows()
        for name, make in made.items():
            try:
                step = make()
                taken = milliseconds(lambda step=step, x_BD=x_BD: step(x_BD), 5, 10)
            except Exception as error:  # theirs, or not installed
                print(f"left out: {name}: {type(error).__name__}: {error}")
                continue
            lines.append([f"{name}, F {d_sae}", f"{taken:.2f}"])
    show("Steps of other trainers, as they come (no TF32)", ["", "ms"], lines)
