"""The method's original command: `python experiment.py --out_dir=run_3` runs the arm of run 3 and reports into run_3/.

The run numbers are those of `pipeline.arms`. `--experiment demo` does the same on the demonstration model.
"""

import argparse
import re
import shutil
import sys
from pathlib import Path

from pipeline.arms import ARMS
from pipeline.cli import main

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument(
    "--out_dir", type=Path, required=True, help="run_0 to run_10; results.json and the page are copied there"
)
parser.add_argument("--experiment", default="gemma-2-2b")
parser.add_argument("--workspace", type=Path, default=Path("workspace"))


def run(arguments: argparse.Namespace) -> None:
    """Run one arm of the study and copy the report of what exists so far into the folder asked for."""
    runs = {str(arm.run): name for name, arm in ARMS.items() if arm.run is not None}
    number = re.fullmatch(r"run_(\d+)", arguments.out_dir.name)
    if not number or number[1] not in runs:
        parser.error(f"--out_dir {arguments.out_dir}: name it run_0 to run_{len(runs) - 1}")
    sys.argv = ["dasae", "ablate", arguments.experiment, "--arms", runs[number[1]], "--workspace", str(arguments.workspace)]
    try:
        main()
    finally:
        report = arguments.workspace / "reports" / Path(arguments.experiment).stem
        if report.is_dir():
            shutil.copytree(report, arguments.out_dir, dirs_exist_ok=True)


if __name__ == "__main__":
    run(parser.parse_args())
