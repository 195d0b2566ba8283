"""The product on one GPU: its ceilings, training steps beside other trainers, whole cohorts, and extraction at Gemma's size.

    python benchmarks/gpu.py                              about six minutes on an H100
    python benchmarks/gpu.py --only ceilings,steps        some of it

Times are medians of elapsed time between two waits for the device, so they hold what Python and launching kernels cost.
Launches, waits and the device's own busy time come from torch's profiler. Activations and weights are random; the shapes are
those of Gemma-2-2B. A part that fails is named and the rest goes on; peers whose packages are not installed are left out.
"""

import argparse
import time
import traceback
from collections.abc import Sequence

import torch
from gpu_stages import cohorts, extraction, study
from gpu_steps import ceilings, kernels, peers, repeat, steps

PARTS = {part.__name__: part for part in (ceilings, steps, kernels, repeat, cohorts, study, extraction, peers)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts that were asked for, and print each table when it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"some of {', '.join(PARTS)}")
    chosen = parser.parse_args(arguments).only.split(",")
    torch.manual_seed(0)
    for name in chosen:
        began = time.perf_counter()
        try:
            PARTS[name]()
        except Exception:
            traceback.print_exc()
        torch.cuda.empty_cache()
        print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
