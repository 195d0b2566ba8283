"""What training takes on a GPU, predicted without one from the kernels of our own code.

    python benchmarks/gpu_model.py [--d-in 2304] [--d-sae 2304 16384] [--batch 2048] [--arms baseline full] [--saes 33]

Tensors have shapes only. A kernel takes the largest of 2 us, its bytes at 2.9 TB/s and its products at 757 TFLOP/s in
bfloat16 and 399 in TF32, in which training multiplies float32, which is what one H100 reached. Steps are recorded, so the
host does not matter. A step takes the sum of its kernels, over the share of those rates that whole steps reached there
(docs/performance.md). **Every time is predicted.**
"""

import argparse
from typing import Any

import torch
from measure import show
from pretend_gpu import PretendedGpu

from pipeline.runtime.precision import tensor_cores
from pipeline.study.arms import Recipes
from pipeline.study.gpu_hours import REACHED
from pipeline.study.recipe import TrainConfig
from pipeline.train import on_gpu
from pipeline.train.step import Trainer

CUDA = torch.device("cuda")


def step(arm: str, precision: str, d_in: int, d_sae: int, batch: int) -> PretendedGpu:
    """The kernels of one step on which no thresholds are due."""
    fields: dict[str, Any] = {"d_sae": d_sae, "steps": 10_000, "batch_size": batch, "precision": precision}
    contrast = {"precision": precision, "pair_refresh": 10}
    recipe = Recipes(TrainConfig.model_validate(fields | {"contrast": contrast}, strict=True))[arm]
    with PretendedGpu(values=False) as gpu, tensor_cores(CUDA):
        trainer = Trainer(config=recipe, d_in=d_in, seed=0, device=CUDA)
        x_BD, _ = on_gpu.batch(torch.empty(batch, d_in, device=CUDA))
        trainer.step(x_BD)
        gpu.reset()
        trainer.step(x_BD)
    return gpu


def main() -> None:
    """Print a line for each arm, precision and width."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--d-in", type=int, default=2304)
    parser.add_argument("--d-sae", type=int, nargs="+", default=[2304, 16384])
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--arms", nargs="+", default=["baseline", "full", "unweighted"])
    parser.add_argument("--precisions", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--saes", type=int, default=33, help="of a cohort, all of this arm")
    parser.add_argument("--steps", type=int, default=9280)
    args = parser.parse_args()
    lines: list[list[str]] = []
    for d_sae in args.d_sae:
        for arm in args.arms:
            for precision in args.precisions:
                gpu = step(arm, precision, args.d_in, d_sae, args.batch)
                seconds = gpu.seconds / REACHED
                numbers = (gpu.bytes / 1e9, seconds * 1e3, seconds * args.saes * args.steps / 60)
                counts = (f"{gpu.launches}", f"{gpu.waits.total()}")
                lines.append([f"{arm}, {precision}", f"{d_sae:,}", *counts, *(f"{number:.2f}" for number in numbers)])
    columns = ["a step of", "d_sae", "kernels", "waits", "GB", "ms", f"{args.saes} SAEs, min"]
    show("Predicted for one H100", columns, lines)


if __name__ == "__main__":
    main()
