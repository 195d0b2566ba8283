"""Writes the table of built-in arms into method.md. Run `python docs/arm_table.py` after a change of `study/arms.py`."""

import json
from pathlib import Path

from pipeline.study.arms import ARMS, Arm

PAGE = Path(__file__).with_name("method.md")
BEGIN, END = "<!-- written by docs/arm_table.py -->", "<!-- until here -->"


def rewritten(page: str) -> str:
    """The page with the current table between its two markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    rows = ["| run | arm | differs from `full` in | asks |", "|---|---|---|---|"]
    for name, arm in ARMS.items():
        run = "" if arm.run is None else arm.run
        rows.append(f"| {run} | `{name}` | {_diff(arm)} | {arm.question} |")
    return "\n".join([before + BEGIN, "", *rows, "", END + after])


def _diff(arm: Arm) -> str:
    """The difference as an experiment file would declare it."""
    fields = {path: "false" if value is None else json.dumps(value) for path, value in arm.diff.items()}
    changes = ", ".join(f"`{path} = {value}`" for path, value in fields.items()) or "nothing"
    return changes if arm.base == "full" else f"`{arm.base}`, with {changes}"


if __name__ == "__main__":
    PAGE.write_text(rewritten(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
