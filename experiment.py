"""The method's original command: `python experiment.py --out_dir=run_3` runs the arm of run 3.

It makes only what is missing and writes the metrics to run_3/final_info.json. Runs 0 to 10 are the arms of the method's plan
(`pipeline.study.arms`). The study is the demonstration, or the one that DASAE_EXPERIMENT names; artefacts are in
DASAE_WORKSPACE, or else in workspace/.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

from pipeline.artefacts.storage import write_atomically
from pipeline.errors import BadInputError, PipelineError
from pipeline.front import open_workspace, plan_of, run
from pipeline.study.arms import ARMS

RUNS = {f"run_{arm.run}": name for name, arm in ARMS.items() if arm.run is not None}


class Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, as `dasae` does."""

    def error(self, message: str) -> NoReturn:
        """Raises BadInputError."""
        raise BadInputError(f"{message}; use: python experiment.py --out_dir=run_3")


def run_arm(out_dir: Path) -> bool:
    """Make what is missing of one arm and write its metrics; returns True when one of its SAEs failed."""
    if out_dir.name not in RUNS:
        raise BadInputError(f"--out_dir {out_dir}: its name must be one of {', '.join(RUNS)}, which chooses the arm")
    from pipeline.evaluate.evaluation import evaluate
    from pipeline.extract.extraction import extract, row_maker
    from pipeline.report.collect import collect
    from pipeline.report.final_info import final_info
    from pipeline.train.training import train

    plan, workspace = plan_of(os.environ.get("DASAE_EXPERIMENT", "demo"), arms=[RUNS[out_dir.name]]), open_workspace()
    extract(plan, workspace)
    failed = train(plan, workspace, row_maker=row_maker).failed
    if len(failed) == len(plan.saes):
        raise PipelineError(f"no SAE of the arm was trained: {'; '.join(f'{sae}: {why}' for sae, why in failed.items())}")
    evaluated = evaluate(plan, workspace)
    failed |= evaluated.degenerate | evaluated.failed
    out_dir.mkdir(parents=True, exist_ok=True)
    info = final_info(collect(plan, workspace))
    write_atomically(out_dir / "final_info.json", json.dumps(info, indent=1, allow_nan=False).encode())
    for sae, why in failed.items():
        print(f"failed: {sae}: {why}", file=sys.stderr)
    return bool(failed)


def main(arguments: list[str] | None = None) -> int:
    """Run one arm. Returns 0 when every SAE is sound, 1 when one is not or a stage failed, 2 for bad input."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, required=True, help="run_0 to run_10; final_info.json is written there")
    return run(lambda: int(run_arm(parser.parse_args(arguments).out_dir)))


if __name__ == "__main__":
    sys.exit(main())
