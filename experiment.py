"""The method's original command: `python experiment.py --out_dir=run_3` runs the arm of run 3, into run_3/final_info.json.

Runs 0 to 10 are the arms of the method's plan (`pipeline.study.arms`). Only what is missing is made. The study is the
demonstration, or the one that DASAE_EXPERIMENT names; artefacts lie in DASAE_WORKSPACE, or else in workspace/.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

from pipeline.artefacts.storage import write_atomically
from pipeline.errors import BadInputError, PipelineError
from pipeline.study.arms import ARMS

RUNS = {f"run_{arm.run}": name for name, arm in ARMS.items() if arm.run is not None}


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the rest of the project does."""

    def error(self, message: str) -> NoReturn:
        """Raises BadInputError."""
        raise BadInputError(f"{message}; say: python experiment.py --out_dir=run_3")


def run(out_dir: Path) -> bool:
    """Extract, train and evaluate what one arm lacks, and write its metrics; returns whether some SAE failed."""
    if out_dir.name not in RUNS:
        raise BadInputError(f"--out_dir {out_dir}: its name must be one of {', '.join(RUNS)}, which chooses the arm")
    from pipeline.artefacts.workspace import Workspace
    from pipeline.evaluate.evaluation import evaluate
    from pipeline.extract.extraction import extract
    from pipeline.report.collect import collect
    from pipeline.report.final_info import final_info
    from pipeline.study.experiment import Experiment
    from pipeline.study.plan import make_plan
    from pipeline.train.training import train

    plan = make_plan(Experiment.load(os.environ.get("DASAE_EXPERIMENT", "demo")), arms=[RUNS[out_dir.name]])
    workspace = Workspace(os.environ.get("DASAE_WORKSPACE", "workspace"))
    extract(plan, workspace)
    failed = train(plan, workspace).failed
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
    """Exit code 0 when every SAE is sound, 1 when one is not or a stage failed, 2 for bad input."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", type=Path, required=True, help="run_0 to run_10; final_info.json is written there")
    try:
        return int(run(parser.parse_args(arguments).out_dir))
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on with what is not finished", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
