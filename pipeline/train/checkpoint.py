"""Checkpoints of SAEs in training: a safetensors file, and a JSON record with its checksum, written last.

A cohort writes the new checkpoints of all members before it removes the old ones. Killed in between, its members still have
a step in common to resume from.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from pipeline.artefacts.identity import sha256, sha256_file
from pipeline.artefacts.storage import LocalStorage

FOLDER = "checkpoint"


def save(folder: Path, state: Mapping[str, torch.Tensor], step: int, facts: Mapping[str, Any]) -> None:
    """Write a checkpoint into an SAE's folder atomically. `facts` holds JSON values."""
    content = safetensors.torch.save({name: tensor.cpu().contiguous() for name, tensor in state.items()})
    storage = LocalStorage(folder / FOLDER)
    storage.write(f"{step:09d}.safetensors", content)
    storage.write(f"{step:09d}.json", json.dumps({"step": step, "sha256": sha256(content), **facts}).encode())


def load(folder: Path, step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """State and facts of a checkpoint that `steps` listed."""
    facts = json.loads((folder / FOLDER / f"{step:09d}.json").read_text(encoding="utf-8"))
    return safetensors.torch.load_file(folder / FOLDER / f"{step:09d}.safetensors"), facts


def steps(folder: Path) -> set[int]:
    """Steps with a complete checkpoint whose checksum matches."""
    return {int(record.stem) for record in (folder / FOLDER).glob("*.json") if _intact(record)}


def _intact(record: Path) -> bool:
    content = record.with_suffix(".safetensors")
    return content.is_file() and sha256_file(content) == json.loads(record.read_text(encoding="utf-8"))["sha256"]


def remove(folder: Path, *, but: int | None = None) -> None:
    """Remove an SAE's checkpoints, or all but one of them."""
    for path in (folder / FOLDER).glob("*"):
        if but is None or path.stem != f"{but:09d}":
            path.unlink()
    if but is None and (folder / FOLDER).is_dir():
        (folder / FOLDER).rmdir()


def resume_points(folders: Sequence[Path]) -> dict[int, list[int]]:
    """Steps to resume from, each with the indices of the folders that resume there.

    A folder resumes from the last step that all folders with checkpoints have in common; if there is none, from its own last
    step. A folder without checkpoints starts at 0.
    """
    there = [steps(folder) for folder in folders]
    common = set[int].intersection(*(found for found in there if found)) if any(there) else set[int]()
    points: dict[int, list[int]] = {}
    for index, found in enumerate(there):
        point = max(common) if found and common else max(found, default=0)
        points.setdefault(point, []).append(index)
    return points
