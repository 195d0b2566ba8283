"""What the contrast costs over a training step on one CPU thread, by kernel, measured in turn in one run.

    python benchmarks/pair_kernels.py [--shapes 192,1536,50 192,1536,400 768,6144,50] [--rounds 5]

A shape is d_in, d_sae and the latents that fire on each of 2,048 rows, with log-normal frequencies. A step is its five
matrix products in float32; ratios are of processor time. The kernel that training chooses is marked.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from measure import interleaved, show

from pipeline.study.penalties import Contrast
from pipeline.train.pair_dense import by_blocks
from pipeline.train.pair_firings import by_rows, by_table
from pipeline.train.pair_kernels import costs, kernel_for
from pipeline.train.pair_selection import SelectedPairs, thresholds
from pipeline.train.penalty import Accumulator
from pipeline.train.weights import decoder_norms

ROWS = 2048
DEAREST = 12.0
"""Times a step from which on a kernel is not measured, only estimated."""


def batch(d_in: int, d_sae: int, l0: float) -> SelectedPairs:
    """Random directions, and latents that fire independently."""
    generator = torch.Generator().manual_seed(0)
    W_dec_FD = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
    frequency_F = torch.randn(d_sae, generator=generator).exp_()
    frequency_F *= l0 / frequency_F.sum()
    f_BF = torch.rand(ROWS, d_sae, generator=generator)
    f_BF *= torch.rand(ROWS, d_sae, generator=generator) < frequency_F
    norm_F, config = decoder_norms(W_dec_FD), Contrast()
    threshold_F = thresholds(W_dec_FD, norm_F, config)[0]
    return SelectedPairs(
        f_BF=f_BF,
        firing_B=torch.sign(f_BF).sum(dim=1),
        W_dec_FD=W_dec_FD,
        norm_F=norm_F,
        threshold_F=threshold_F,
        config=config,
    )


def five_products(pairs: SelectedPairs, x_BD: torch.Tensor) -> None:
    """The matrix products of a step without the contrast."""
    f_BF, W_dec_FD = pairs.f_BF, pairs.W_dec_FD
    W_enc_DF = W_dec_FD.T.contiguous()
    torch.mm(x_BD, W_enc_DF)
    residual_BD = torch.mm(f_BF, W_dec_FD)
    torch.mm(residual_BD, W_dec_FD.T)
    torch.mm(f_BF.T, residual_BD)
    torch.mm(x_BD.T, f_BF)


def measure(d_in: int, d_sae: int, l0: float, rounds: int) -> list[str]:
    """A line of the table."""
    pairs, x_BD = batch(d_in, d_sae, l0), torch.randn(ROWS, d_in)
    into = Accumulator(f_BF=torch.zeros_like(pairs.f_BF), W_dec_FD=torch.zeros_like(pairs.W_dec_FD), weight=0.1)
    unit, expected = 5 * ROWS * d_in * d_sae, costs(pairs)
    kernels = [kernel for kernel in (by_blocks, by_table, by_rows) if expected.get(kernel, unit * DEAREST) < unit * DEAREST]
    contestants: dict[str, Callable[[], object]] = {"step": partial(five_products, pairs, x_BD)}
    contestants |= {kernel.__name__: partial(kernel, pairs, into) for kernel in kernels}
    contestants["thresholds"] = partial(thresholds, pairs.W_dec_FD, pairs.norm_F, pairs.config)
    timings = interleaved(contestants, rounds)
    step = timings["step"].cpu_seconds
    chosen = kernel_for(pairs).__name__

    def cell(name: str) -> str:
        if name not in timings:
            return "-"
        ratio = f"{timings[name].cpu_seconds / step:.2f}"
        return f"[{ratio}]" if name == chosen else ratio

    return [
        f"{d_in}, {d_sae:,}, {l0:g}",
        f"{step * 1e3:.0f}",
        *map(cell, ("by_blocks", "by_table", "by_rows", "thresholds")),
    ]


def main() -> None:
    """Print a line for each shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["192,1536,50", "192,1536,400", "768,6144,50"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    shapes = [tuple(map(int, shape.split(","))) for shape in args.shapes]
    lines = [measure(d_in, d_sae, l0, args.rounds) for d_in, d_sae, l0 in shapes]
    show(
        "The contrast over a step",
        ["d_in, d_sae, L0", "step, CPU ms", "by blocks", "by table", "by rows", "thresholds"],
        lines,
    )


if __name__ == "__main__":
    main()
