"""How long one training step takes, as ratios to its floor and to other trainers, measured in turn in one run.

    python benchmarks/train_step.py                                       # gemma-2-2b's width, minutes
    python benchmarks/train_step.py --d-in 768 --d-sae 1536 --rounds 5    # a look

Every contestant takes one step on the same batch in each round (A B C A B C ...), so that whatever else the machine does
meets all of them; the table has medians over rounds. Ratios are of processor time, summed over threads: on a machine that
does nothing else they are those of elapsed time, and on a busy one they still mean something. Contestants whose packages are
not installed are left out. The floor is the five matrix products no trainer can do without. Memory is the difference between
the peaks of two processes.
"""

import argparse
import math
import multiprocessing
import resource
import statistics
import sys
import time
import types
from collections.abc import Callable

import torch

from pipeline.runtime.compatibility import importing_sae_bench
from pipeline.sae.activations import RELU
from pipeline.study.penalties import Contrast
from pipeline.study.recipe import TrainConfig
from pipeline.train import losses
from pipeline.train.pair_selection import thresholds
from pipeline.train.step import Trainer
from pipeline.train.weights import decoder_norms

Step = Callable[[torch.Tensor], object]
STEPS = 1_000_000
"""Total steps that schedules are told, so that none ends here."""


def trainer(arguments: argparse.Namespace, **changes: object) -> Trainer:
    """A Trainer on whose batches `arguments.l0` latents fire per row."""
    config = TrainConfig.model_validate(
        {"d_sae": arguments.d_sae, "steps": STEPS, "batch_size": arguments.batch, "contrast": None, "resets": None} | changes
    )
    made = Trainer(config=config, d_in=arguments.d_in, seed=0)
    # Encoder rows of norm 0.1 on rows of norm 1: pre-activations are normal, of this deviation.
    deviation = 0.1 / math.sqrt(arguments.d_in)
    made.weights.b_enc_F.fill_(torch.special.ndtri(torch.tensor(arguments.l0 / arguments.d_sae)).item() * deviation)
    return made


def rows(arguments: argparse.Namespace) -> torch.Tensor:
    """A batch with E||x||^2 = 1."""
    return torch.randn(arguments.batch, arguments.d_in) / math.sqrt(arguments.d_in)


def products(arguments: argparse.Namespace, dtype: torch.dtype) -> Step:
    """The five matrix products of a step, into memory that exists."""
    B, D, F = arguments.batch, arguments.d_in, arguments.d_sae
    x_BD, f_BF, W_DF, V_FD = (torch.randn(*shape).to(dtype) for shape in ((B, D), (B, F), (D, F), (F, D)))
    to_BF, to_BD, to_FD, to_DF = (torch.empty_like(tensor) for tensor in (f_BF, x_BD, V_FD, W_DF))

    def run(_: torch.Tensor) -> None:
        torch.mm(x_BD, W_DF, out=to_BF)
        torch.mm(f_BF, V_FD, out=to_BD)
        torch.mm(x_BD, V_FD.T, out=to_BF)
        torch.mm(f_BF.T, x_BD, out=to_FD)
        torch.mm(x_BD.T, f_BF, out=to_DF)

    return run


def plain(arguments: argparse.Namespace) -> Step:
    """Autograd of the loss as defined, and torch's fused Adam."""
    weights = trainer(arguments).weights
    optimizer = torch.optim.Adam(weights.tensors(), lr=3e-4, fused=True)
    loss = losses.Objective(activation=RELU, l1=0.04)

    def run(x_BD: torch.Tensor) -> None:
        measured = losses.differentiated(weights, x_BD, loss)
        for parameter, gradient in zip(weights.tensors(), measured.gradient.tensors(), strict=True):
            parameter.grad = gradient
        optimizer.step()

    return run


def dictionary_learning(arguments: argparse.Namespace) -> Step:
    """`StandardTrainer.update`, as its own training loop calls it."""
    # Only its activation buffers, which are not used here, need nnsight.
    sys.modules.setdefault("nnsight", types.SimpleNamespace(LanguageModel=object))  # pyright: ignore[reportArgumentType]
    from dictionary_learning.trainers.standard import StandardTrainer

    theirs = StandardTrainer(
        steps=STEPS, activation_dim=arguments.d_in, dict_size=arguments.d_sae, layer=0, lm_name="", device="cpu"
    )
    state = iter(range(STEPS))
    return lambda x_BD: theirs.update(next(state), x_BD)


def saelens(arguments: argparse.Namespace, *, autocast: bool) -> Step:
    """SAELens' `SAETrainer.step` on a standard SAE, without its logging."""
    with importing_sae_bench():
        from sae_lens import StandardTrainingSAE, StandardTrainingSAEConfig
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

    theirs = SAETrainer(
        cfg=SAETrainerConfig(
            total_training_samples=STEPS * arguments.batch,
            train_batch_size_samples=arguments.batch,
            lr_end=3e-5,
            autocast=autocast,
            logger=LoggingConfig(log_to_wandb=False),
        ),
        sae=StandardTrainingSAE(StandardTrainingSAEConfig(d_in=arguments.d_in, d_sae=arguments.d_sae, l1_coefficient=0.04)),
        data_provider=iter(()),
    )
    return theirs.step


def eight(step: Step) -> Step:
    """Eight steps in a turn."""
    return lambda x_BD: [step(x_BD) for _ in range(8)]


def contestants(arguments: argparse.Namespace) -> dict[str, Callable[[], Step]]:
    """What can be measured, by name."""
    pairs = {"pair_refresh": STEPS, "precision": "bfloat16"}
    with_contrast = trainer(arguments, contrast=Contrast.model_validate(pairs))
    one_in_eight = trainer(arguments, contrast=Contrast.model_validate(pairs | {"every": 8}))
    return {
        "floor, float32": lambda: products(arguments, torch.float32),
        "ours, float32": lambda: trainer(arguments).step,
        "autograd, float32": lambda: plain(arguments),
        "dictionary_learning, float32": lambda: dictionary_learning(arguments),
        "SAELens, float32": lambda: saelens(arguments, autocast=False),
        "floor, bfloat16": lambda: products(arguments, torch.bfloat16),
        "ours, bfloat16": lambda: trainer(arguments, precision="bfloat16").step,
        "SAELens, autocast": lambda: saelens(arguments, autocast=True),
        "ours, float32, contrast": lambda: with_contrast.step,
        "ours, float32, contrast in 1 of 8": lambda: eight(one_in_eight.step),
        "thresholds": lambda: (
            lambda _: thresholds(with_contrast.weights.W_dec_FD, decoder_norms(with_contrast.weights.W_dec_FD), Contrast())
        ),
    }


def seconds(arguments: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Median seconds of a step of each contestant that is installed: elapsed, and processor time."""
    steps: dict[str, Step] = {}
    for name, make in contestants(arguments).items():
        try:
            steps[name] = make()
        except ImportError as error:
            print(f"left out: {name} ({error})")
    x_BD = rows(arguments)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for number in range(arguments.rounds + 1):
        for name, step in steps.items():
            started = time.perf_counter(), time.process_time()
            step(x_BD)
            parts = 8 if name.endswith("of 8") else 1
            if number:  # the first round fills caches and buffers, and computes thresholds
                elapsed, used = time.perf_counter() - started[0], time.process_time() - started[1]
                taken[name].append((elapsed / parts, used / parts))
    return {
        name: (statistics.median(elapsed for elapsed, _ in times), statistics.median(used for _, used in times))
        for name, times in taken.items()
    }


def peak(arguments: argparse.Namespace, l0: float, contrast: Contrast | None) -> int:
    """Largest resident memory, in bytes, of a process that takes two steps."""
    torch.set_num_threads(arguments.threads)
    arguments = argparse.Namespace(**vars(arguments) | {"d_sae": 8192, "batch": 2048, "l0": l0})
    step = trainer(arguments, contrast=contrast).step
    for _ in range(2):
        step(rows(arguments))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def extra_memory(arguments: argparse.Namespace, l0: float) -> float:
    """Megabytes that the contrast adds at F 8192 and B 2048."""
    peaks = []
    for contrast in (Contrast(precision="bfloat16"), None):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            peaks.append(pool.apply(peak, (arguments, l0, contrast)))
    return (peaks[0] - peaks[1]) / 1e6


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=2304)
    parser.add_argument("--d-sae", type=int, default=2304)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--l0", type=float, default=50, help="latents that fire per row")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-memory", action="store_true", help="leave out the memory of the contrast at F 8192")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    print(
        f"d_in {arguments.d_in}, d_sae {arguments.d_sae}, batch {arguments.batch}, L0 {arguments.l0:g}, "
        f"{arguments.threads} threads, medians of {arguments.rounds} rounds, torch {torch.__version__}\n"
    )
    if not arguments.no_memory:  # first, because a process inherits the peak of the one that starts it
        for kernel, l0 in (("by blocks (L0 1000)", 1000), ("by rows (L0 50)", 50)):
            print(f"contrast at d_sae 8192, {kernel}: {extra_memory(arguments, l0):.0f} MB", flush=True)
    median = seconds(arguments)
    print("\n| a step of | ms | processor ms | over ours, float32 | over ours, bfloat16 |\n|---|---|---|---|---|")
    for name, (elapsed, used) in median.items():
        ratios = " | ".join(f"{used / median[f'ours, {dtype}'][1]:.2f}" for dtype in ("float32", "bfloat16"))
        print(f"| {name} | {elapsed * 1e3:.0f} | {used * 1e3:.0f} | {ratios} |")


if __name__ == "__main__":
    main()
