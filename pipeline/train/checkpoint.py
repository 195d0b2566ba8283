"""Checkpoints of SAEs in training: a safetensors file, and a sealed JSON record, written last.

The record holds the hash of the tensors and of the training log so far, so that no training goes on from damaged work. A
cohort writes the new checkpoints of all members before it removes the old ones. Killed in between, its members still have a
step in common to resume from.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from pipeline.artefacts.identity import is_sealed, sealed, sha256, sha256_file
from pipeline.artefacts.storage import LocalStorage
from pipeline.errors import BadInputError
from pipeline.study.plan import TRAINING_LOG
from pipeline.train import log

FOLDER = "checkpoint"


def save(folder: Path, state: Mapping[str, torch.Tensor], step: int, facts: Mapping[str, Any]) -> None:
    """Write a checkpoint into an SAE's folder atomically. `facts` holds JSON values."""
    content = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in state.items()})
    record = {"step": step, "sha256": sha256(content), "log": log.mark(folder / TRAINING_LOG), **facts}
    storage = LocalStorage(_place(folder))
    storage.write(f"{step:09d}.safetensors", content)
    storage.write(f"{step:09d}.json", json.dumps(sealed(record)).encode())


def load(folder: Path, step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State and facts of a checkpoint that `steps` listed. The entry `log` is what `log.until` takes."""
    place = _place(folder)
    facts = json.loads((place / f"{step:09d}.json").read_text(encoding="utf-8"))
    return safetensors.torch.load_file(place / f"{step:09d}.safetensors"), facts


def steps(folder: Path) -> set[int]:
    """Steps with a complete checkpoint, whose tensors and log are as they were when it was saved."""
    return {step for step, intact in _found(folder).items() if intact}


def _found(folder: Path) -> dict[int, bool]:
    """Steps that have a record, and whether one can go on from there."""
    records = [record for record in _place(folder).glob("*.json") if record.stem.isdecimal()]
    return {int(record.stem): _intact(folder, record) for record in records}


def _intact(folder: Path, record: Path) -> bool:
    content = record.with_suffix(".safetensors")
    try:
        facts = json.loads(record.read_bytes())
        return (
            is_sealed(facts)
            and facts["step"] == int(record.stem)
            and log.until(folder / TRAINING_LOG, facts["log"]) is not None
            and content.is_file()
            and sha256_file(content) == facts["sha256"]
        )
    except (ValueError, TypeError, KeyError):  # no JSON, or not what `save` writes
        return False


def remove(folder: Path, *, but: int | None = None) -> None:
    """Remove an SAE's checkpoints, or all but one of them."""
    place = _place(folder)
    # Records first: one without its tensors would be taken for damage.
    for path in sorted(place.glob("*"), key=lambda path: path.suffix != ".json"):
        if but is None or path.stem != f"{but:09d}":
            path.unlink(missing_ok=True)
    if but is None and place.is_dir():
        place.rmdir()


def resume_points(folders: Sequence[Path]) -> dict[int, list[int]]:
    """Steps to resume from, each with the indices of the folders that resume there.

    A folder resumes from the last step that all folders with checkpoints have in common; if there is none, from its own last
    step. A folder without checkpoints starts at 0. Says so where a checkpoint is damaged.
    """
    found = [_found(folder) for folder in folders]
    there = [{step for step, intact in known.items() if intact} for known in found]
    common = set[int].intersection(*(known for known in there if known)) if any(there) else set[int]()
    points: dict[int, list[int]] = {}
    for index, known in enumerate(there):
        point = max(common) if known and common else max(known, default=0)
        points.setdefault(point, []).append(index)
        if damaged := sorted(found[index].keys() - known):
            which = ", ".join(map(str, damaged))
            begins = f"from step {point}" if point else "from the start"
            remark = f"the checkpoint of step {which} or its log is damaged; training goes on {begins}"
            print(f"{folders[index]}: {remark}", file=sys.stderr)
    return points


def own(folder: Path) -> Path:
    """The folder, which is to hold work in hand. Raises BadInputError for a link, which may lead out of the workspace."""
    if folder.is_symlink():
        raise BadInputError(f"{folder} is a link, and work in hand is not kept elsewhere; remove it and run again")
    return folder


def _place(folder: Path) -> Path:
    return own(folder / FOLDER)
