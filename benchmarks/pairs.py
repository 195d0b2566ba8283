"""Counting the pairs of latents that fire together: from those that fire on a row, and by dense products of all latents.

    python benchmarks/pairs.py [--d-sae 2304 16384] [--l0 50] [--rows 16384] [--rounds 3]

Both count the same rows in turn; the script fails when they differ. Latents fire with log-normal frequencies. The dense
products are of one panel of latents where all would take minutes, multiplied by the number of panels.
"""

import argparse
from functools import partial

import torch
from measure import interleaved, show

from pipeline.evaluate import sparse
from pipeline.evaluate.sparse import SparseLatents, add_pairs

PANEL = 2048
"""Latents whose pairs the dense products count."""


def latents(rows: int, d_sae: int, l0: float) -> torch.Tensor:
    """Latents [B, F] with so many firing on a row, some often and most seldom."""
    generator = torch.Generator().manual_seed(0)
    frequency_F = torch.randn(d_sae, generator=generator).mul_(1.2).exp_()
    frequency_F *= l0 / frequency_F.sum()
    fires_BF = torch.rand(rows, d_sae, generator=generator) < frequency_F
    return torch.rand(rows, d_sae, generator=generator) * fires_BF


def measure(d_sae: int, l0: float, rows: int, rounds: int) -> list[str]:
    """A line of the table: CPU microseconds a row of both."""
    group, panel = SparseLatents.of(latents(rows, d_sae, l0)), slice(0, min(PANEL, d_sae))
    counts: dict[str, torch.Tensor] = {}

    def count(name: str, cost: float, block: slice) -> None:
        sparse.PAIR_COST = cost
        joint_bF = torch.zeros(block.stop, d_sae)
        add_pairs(group, block, joint_bF, torch.zeros_like(joint_bF))
        counts[name] = joint_bF[panel]

    timings = interleaved(
        {"firing": partial(count, "firing", 0.0, slice(0, d_sae)), "dense": partial(count, "dense", 1e12, panel)}, rounds
    )
    assert torch.equal(*counts.values()), "the counts differ"
    firing, dense = (timing.cpu_seconds / rows * 1e6 for timing in timings.values())
    dense *= d_sae / panel.stop
    return [f"{d_sae:,}", f"{group.firings / rows:.1f}", f"{firing:.0f}", f"{dense:.0f}", f"{dense / firing:.1f}"]


def main() -> None:
    """Print a line for each width and L0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-sae", type=int, nargs="+", default=[2304, 16384])
    parser.add_argument("--l0", type=float, nargs="+", default=[50, 200])
    parser.add_argument("--rows", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    lines = [measure(d_sae, l0, args.rows, args.rounds) for d_sae in args.d_sae for l0 in args.l0]
    show("Counting pairs", ["d_sae", "L0", "firing, CPU us/row", "dense, CPU us/row", "dense / firing"], lines)


if __name__ == "__main__":
    main()
