"""Writes what each test text adds to the scores of sparse probes, from which follows how far they depend on the texts."""

import base64
import zlib
from typing import Any

import torch

from pipeline.evaluate.bench import Bench
from pipeline.evaluate.sparse_probing import probed


def compute(on: Bench) -> dict[str, Any]:
    """The content of `probe_texts.json` (docs/evaluation-files.md). Raises DegenerateSAEError as `sparse_probing` does."""
    of_texts = probed(on).of_texts
    return {
        "datasets": {name: {k: packed(added_S) for k, added_S in by_k.items()} for name, by_k in of_texts.items()},
        "reason": None if of_texts else "in sae-bench's order of random numbers, every SAE gets problems of its own",
    }


def packed(added_S: torch.Tensor) -> str:
    """Numbers as text: little-endian float32, compressed by zlib, in base64. Few values differ, which makes it short."""
    return base64.b64encode(zlib.compress(added_S.to(torch.float32).numpy().astype("<f4").tobytes(), 9)).decode("ascii")
