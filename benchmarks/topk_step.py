"""A training step of a TopK and a BatchTopK SAE beside those of other trainers, measured in turn in one run.

    python benchmarks/topk_step.py [--d-in 2304] [--d-sae 2304] [--k 50] [--batch 2048] [--rounds 5]

Every contestant takes one step on the same batch in each round; the table has medians over rounds, and ratios of processor
time. The floor is what no such step can do without: the encoder's product, and the selection of the latents that fire.
Weights are as drawn, biases as in `train_step.py`. Contestants whose packages are not installed are left out; sparsify's is
`eai-sparsify`, which no extra installs. "Matryoshka" is ours with five prefixes.
"""

import argparse
import statistics
import sys
import time
import types
import warnings
from collections.abc import Callable

import torch
import train_step
from train_step import STEPS, Step

from pipeline.runtime.compatibility import importing_sae_bench
from pipeline.sae.activations import ACTIVATIONS
from pipeline.sae.topk import Selecting
from pipeline.train.step import Trainer


def ours(arguments: argparse.Namespace, activation: str, **changes: object) -> Trainer:
    """A Trainer with that backbone."""
    made = train_step.trainer(arguments, activation=activation, k=arguments.k, decoder_norm="unit", l1_warmup=0, **changes)
    made.weights.b_enc_F.zero_()
    return made


def matryoshka(arguments: argparse.Namespace, activation: str) -> Step:
    """Ours with five prefixes, each twice the one before."""
    return ours(arguments, activation, prefixes=tuple(arguments.d_sae // 2**power for power in (4, 3, 2, 1, 0))).step


def sparsify(arguments: argparse.Namespace, activation: str) -> Step:
    """Its SparseCoder with Adam and a decoder of unit norm, as its trainer steps; it has no BatchTopK."""
    if activation != "topk":
        raise ImportError("it has no BatchTopK")
    from sparsify import SparseCoder, SparseCoderConfig  # pyright: ignore[reportMissingImports]

    coder = SparseCoder(arguments.d_in, SparseCoderConfig(num_latents=arguments.d_sae, k=arguments.k))
    optimizer = torch.optim.Adam(coder.parameters(), lr=3e-4, fused=True)

    def step(x_BD: torch.Tensor) -> None:
        optimizer.zero_grad()
        coder(x_BD).fvu.backward()
        coder.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        coder.set_decoder_norm_to_unit_norm()

    return step


def floor(arguments: argparse.Namespace, activation: str) -> Step:
    """The encoder's product and the selection."""
    made = ours(arguments, activation)
    selecting = ACTIVATIONS[activation].for_training(made.config)
    assert isinstance(selecting, Selecting)
    pre_BF, norm_F = torch.empty(arguments.batch, arguments.d_sae), torch.ones(arguments.d_sae)
    return lambda x_BD: selecting.in_training_(torch.mm(x_BD, made.weights.W_enc_DF, out=pre_BF), norm_F)


def dictionary_learning(arguments: argparse.Namespace, activation: str) -> Step:
    """`update`, as its own training loop calls it."""
    # Only its activation buffers, which are not used here, need nnsight.
    sys.modules.setdefault("nnsight", types.SimpleNamespace(LanguageModel=object))  # pyright: ignore[reportArgumentType]
    from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[activation](
        steps=STEPS,
        activation_dim=arguments.d_in,
        dict_size=arguments.d_sae,
        k=arguments.k,
        layer=0,
        lm_name="",
        device="cpu",
    )  # fmt: skip
    state = iter(range(1, STEPS))  # step 0 also computes the median of the batch
    return lambda x_BD: trainer.update(next(state), x_BD)


def saelens(arguments: argparse.Namespace, activation: str) -> Step:
    """`SAETrainer.step`, without its logging."""
    with importing_sae_bench():
        import sae_lens
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

    kind = {"topk": "TopK", "batchtopk": "BatchTopK"}[activation]
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=arguments.d_in, d_sae=arguments.d_sae, k=arguments.k)
    settings = SAETrainerConfig(
        total_training_samples=STEPS * arguments.batch, train_batch_size_samples=arguments.batch, lr_end=3e-5,
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    return SAETrainer(cfg=settings, sae=getattr(sae_lens, f"{kind}TrainingSAE")(config), data_provider=iter(())).step


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("d-in", 2304), ("d-sae", 2304), ("k", 50), ("batch", 2048), ("rounds", 5), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    arguments.l0 = arguments.k
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    makers: dict[str, Callable[[argparse.Namespace, str], Step]] = {
        "floor": floor,
        "ours": lambda args, activation: ours(args, activation).step,
        "dictionary_learning": dictionary_learning,
        "SAELens": saelens,
        "sparsify": sparsify,
        "ours, Matryoshka": matryoshka,
    }
    print(f"{vars(arguments)}, medians, torch {torch.__version__}\n")
    print("| a step of | ms | processor ms | over ours |\n|---|---|---|---|")
    for activation in ("topk", "batchtopk"):
        steps: dict[str, Step] = {}
        for name, make in makers.items():
            try:
                steps[name] = make(arguments, activation)
            except ImportError as error:
                print(f"left out: {name} ({error})")
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
        x_BD = train_step.rows(arguments)
        for number in range(arguments.rounds + 1):
            for name, step in steps.items():
                began = time.perf_counter(), time.process_time()
                step(x_BD)
                if number:  # the first fills buffers
                    taken[name].append((time.perf_counter() - began[0], time.process_time() - began[1]))
        median = {name: [statistics.median(column) for column in zip(*times, strict=True)] for name, times in taken.items()}
        for name, (elapsed, used) in median.items():
            print(f"| {activation}, {name} | {elapsed * 1e3:.0f} | {used * 1e3:.0f} | {used / median['ours'][1]:.2f} |")


if __name__ == "__main__":
    main()
