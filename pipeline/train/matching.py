"""Matching L0: the search for the sparsity weight at which an SAE has the L0 of another one, its reference.

L0 falls as l1 rises. l1 is doubled or halved until one try has more and one less than the target, then the geometric mean of
the two closest is tried. Every try is a whole training, in a folder of its own below the artefact's; only the closest stays.

Shapes: B rows, D d_in, F d_sae.
"""

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.artefacts.storage import fsync, write_atomically
from pipeline.sae.sae import SAE, WEIGHTS
from pipeline.study.plan import TRAINING_LOG
from pipeline.study.planned import TrainedSAE
from pipeline.train import checkpoint
from pipeline.train.run import InTraining, Job, Runner

TOLERANCE = 0.02
"""Largest |L0 / target - 1| that counts as matched."""
MOST_TRIES = 10
FACTOR = 2.0
"""From one l1 to the next as long as all tries are on the same side of the target."""
HELDOUT_ROWS = 65_536
"""Held-out rows on which every L0 is measured, at most."""
TRIES = "tries"
RECORD = "matching.json"


@dataclass(frozen=True, kw_only=True)
class Try:
    """A training with one l1, and what came of it."""

    l1: float
    l0: float | None
    """None when it did not come to its end."""
    resets: int = 0
    seconds: float = 0.0
    stopped: str | None = None
    """Why it did not come to its end."""


def distance(tried: Try, target: float) -> float:
    """|L0 / target - 1|, infinite for a try that did not come to its end."""
    return math.inf if tried.l0 is None else abs(tried.l0 / target - 1)


def next_l1(tries: Sequence[Try], start: float, target: float) -> float | None:
    """The l1 to try after `tries`, the first of which had `start`; None when the search is over.

    It is over when a try is within the tolerance, when one did not come to its end, and after MOST_TRIES.
    """
    if not tries:
        return start
    if len(tries) >= MOST_TRIES or tries[-1].l0 is None or distance(tries[-1], target) <= TOLERANCE:
        return None
    too_dense = [tried.l1 for tried in tries if tried.l0 is not None and tried.l0 > target]
    too_sparse = [tried.l1 for tried in tries if tried.l0 is not None and tried.l0 < target]
    if not too_sparse:
        return max(too_dense) * FACTOR
    if not too_dense:
        return min(too_sparse) / FACTOR
    return math.sqrt(max(too_dense) * min(too_sparse))


def heldout_l0(saes: Sequence[SAE], batches: Iterable[torch.Tensor]) -> list[float]:
    """Mean number of latents of each SAE that fire on a row, over the first HELDOUT_ROWS of unscaled `batches` [B, D]."""
    fired, rows = [0] * len(saes), 0
    for x_BD in batches:
        x_BD = x_BD[: HELDOUT_ROWS - rows]
        fired = [count + int((sae.encode(x_BD) > 0).sum()) for sae, count in zip(saes, fired, strict=True)]
        rows += len(x_BD)
        if rows == HELDOUT_ROWS:
            break
    return [count / rows for count in fired]


@dataclass(kw_only=True)
class Search:
    """The tries of one SAE. What is on disk is enough to go on after its last finished one."""

    sae: TrainedSAE
    folder: Path
    """Holds the record, and a folder per try."""
    target: float
    reference: Mapping[str, str]
    """Which making of the reference the target was measured on."""
    tries: list[Try] = field(default_factory=list)

    def __post_init__(self) -> None:
        record = self.folder / RECORD
        if record.is_file():
            known = json.loads(record.read_text(encoding="utf-8"))
            # Tries follow from the target: if the reference was made again and differs, they lead elsewhere.
            if known["target_l0"] == self.target:
                self.tries = [Try(**tried) for tried in known["tries"]]
            else:
                shutil.rmtree(self.folder)

    @property
    def l1(self) -> float | None:
        """What to try next; None when the search is over."""
        return next_l1(self.tries, self.sae.recipe.l1, self.target)

    @property
    def job(self) -> Job:
        """The next try."""
        folder = self._folder(len(self.tries))
        folder.mkdir(parents=True, exist_ok=True)
        return Job(sae=self.sae, recipe=self.sae.recipe.model_copy(update={"l1": self.l1}), folder=folder)

    @property
    def closest(self) -> Try:
        """The try that is kept."""
        return self.tries[self._closest]

    @property
    def kept(self) -> Path:
        """Folder with weights and log of the closest try."""
        return self._folder(self._closest)

    @property
    def found(self) -> bool:
        """Whether the closest try is within the tolerance."""
        return distance(self.closest, self.target) <= TOLERANCE

    @property
    def facts(self) -> dict[str, Any]:
        """What the artefact says of its search."""
        return {
            "reference": self.sae.recipe.match_l0,
            "target_l0": self.target,
            "l0": self.closest.l0,
            "l1": self.closest.l1,
            "tries": len(self.tries),
            "within_tolerance": self.found,
        }

    def record(self, member: InTraining, l0: float | None) -> None:
        """Take in a finished try, whose weights and log are in its folder."""
        resets, seconds = member.trainer.resets, member.seconds
        l1 = member.job.recipe.l1
        self.tries.append(Try(l1=l1, l0=l0, resets=resets, seconds=seconds, stopped=member.stopped))
        content = {"target_l0": self.target, "tries": [asdict(tried) for tried in self.tries]}
        write_atomically(self.folder / RECORD, json.dumps(content, indent=1).encode())
        for number in range(len(self.tries)):
            if number != self._closest:
                shutil.rmtree(self._folder(number), ignore_errors=True)
        checkpoint.remove(self.kept)

    @property
    def _closest(self) -> int:
        return min(range(len(self.tries)), key=lambda number: distance(self.tries[number], self.target))

    def _folder(self, number: int) -> Path:
        return self.folder / f"{number:02d}"


def search(searches: Sequence[Search], runner: Runner, heldout: Callable[[], Iterator[torch.Tensor]]) -> None:
    """Take every search to its end, one try of each per round, in lockstep. `heldout` gives unscaled held-out rows.

    Raises InterruptedRunError after SIGTERM, with everything saved.
    """
    while going_on := [one for one in searches if one.l1 is not None]:
        by_name = {str(one.sae): one for one in going_on}
        number = max(len(one.tries) for one in going_on) + 1
        for members in runner.run([one.job for one in going_on], f"match L0, try {number}:"):
            finished = [member for member in members if member.stopped is None]
            for member in finished:
                member.trainer.finished(runner.store.scale(member.job.sae.layer)).save(member.job.folder, {})
                for name in (WEIGHTS, TRAINING_LOG):
                    fsync(member.job.folder / name)
            measured = heldout_l0([SAE.load(member.job.folder / WEIGHTS) for member in finished], heldout())
            l0 = {str(member.job.sae): value for member, value in zip(finished, measured, strict=True)}
            for member in members:
                by_name[str(member.job.sae)].record(member, l0.get(str(member.job.sae)))
