"""Searches for the sparsity weight l1 at which an SAE has the L0 of another SAE.

L0 falls as l1 rises. l1 is doubled or halved until the target lies between two tries, then their geometric mean is tried.
Each try is a whole training in its own folder below the artefact's; only the closest is kept.
"""

import json
import math
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.artefacts.identity import is_sealed, sealed, sha256_file
from pipeline.artefacts.storage import fsync, write_atomically
from pipeline.errors import CorruptArtefactError
from pipeline.sae.formats import CONFIG, WEIGHTS, read_sae, write_sae
from pipeline.sae.sae import SAE
from pipeline.study.plan import TRAINING_LOG
from pipeline.study.planned import TrainedSAE
from pipeline.train import checkpoint
from pipeline.train.run import InTraining, Job, Runner

TOLERANCE = 0.02
"""Largest |L0 / target - 1| that counts as matched."""
MOST_TRIES = 10
FACTOR = 2.0
"""Ratio of one l1 to the next while all tries lie on one side of the target."""
HELDOUT_ROWS = 65_536
"""Most held-out rows on which an L0 is measured."""
TRIES = "tries"
RECORD = "matching.json"


@dataclass(frozen=True, kw_only=True)
class Try:
    """One training with one l1, and its outcome."""

    l1: float
    l0: float | None
    """None when the training stopped early."""
    resets: int = 0
    seconds: float = 0.0
    stopped: str | None = None
    """Why the training stopped early."""


def distance(tried: Try, target: float) -> float:
    """|L0 / target - 1|; infinite for a try that stopped early."""
    return math.inf if tried.l0 is None else abs(tried.l0 / target - 1)


def next_l1(tries: Sequence[Try], start: float, target: float) -> float | None:
    """The l1 to try next, `start` for the first try; None when the search is over.

    The search ends when a try is within the tolerance, when a try stopped early, and after MOST_TRIES.
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
    """L0 of each SAE on the first HELDOUT_ROWS rows of unscaled `batches` [B, D]; the SAEs are on one device."""
    fired, rows = [torch.zeros((), dtype=torch.int64, device=sae.device) for sae in saes], 0
    for batch_BD in batches if saes else ():
        x_BD = batch_BD[: HELDOUT_ROWS - rows].to(saes[0].device)
        for sae, count in zip(saes, fired, strict=True):
            count += (sae.encode(x_BD) > 0).sum()
        rows += len(x_BD)
        if rows == HELDOUT_ROWS:
            break
    return [int(count) / rows for count in fired]


@dataclass(kw_only=True)
class Search:
    """The tries of one SAE. The record on disk is enough to resume after the last finished try."""

    sae: TrainedSAE
    folder: Path
    """Holds the record and one folder per try."""
    target: float
    parents: Mapping[str, str]
    """Fingerprint of the SAE on which the target was measured."""
    tries: list[Try] = field(default_factory=list[Try])
    kept_files: dict[str, str] = field(default_factory=dict[str, str])
    """SHA-256 of each file of the try that is kept."""

    def __post_init__(self) -> None:
        record = checkpoint.own(self.folder) / RECORD
        if not record.is_file():
            return
        try:
            known = _record(record)
            # The tries depend on the target. If the SAE it was measured on was rebuilt and differs, they are void.
            if known["target_l0"] == self.target:
                self.tries, self.kept_files = [Try(**tried) for tried in known["tries"]], known["kept"]
                self.check_kept()
                return
        except (CorruptArtefactError, ValueError, TypeError, KeyError):  # not what `record` writes, or changed since
            print(f"{self.folder} is damaged; the search for {self.sae} begins again", file=sys.stderr)
        self.tries, self.kept_files = [], {}
        shutil.rmtree(self.folder)

    def check_kept(self) -> None:
        """Raise CorruptArtefactError if the weights or the log of the closest try are not as they were recorded."""
        for name, known in self.kept_files.items():
            path = self.kept / name
            if not path.is_file() or sha256_file(path) != known:
                raise CorruptArtefactError(f"{path} was changed after it was made; run the same command again")

    @property
    def l1(self) -> float | None:
        """The l1 to try next; None when the search is over."""
        return next_l1(self.tries, self.sae.recipe.l1, self.target)

    def next_job(self) -> Job:
        """The next try, whose folder is made."""
        folder = checkpoint.own(self._folder(len(self.tries)))
        folder.mkdir(parents=True, exist_ok=True)
        return Job(sae=self.sae, recipe=self.sae.recipe.model_copy(update={"l1": self.l1}), folder=folder)

    @property
    def closest(self) -> Try:
        """The try that is kept."""
        return self.tries[self._closest]

    @property
    def kept(self) -> Path:
        """Folder with the weights and log of the closest try."""
        return self._folder(self._closest)

    @property
    def found(self) -> bool:
        """True if the closest try is within the tolerance."""
        return distance(self.closest, self.target) <= TOLERANCE

    @property
    def facts(self) -> dict[str, Any]:
        """The facts of the search that go into the manifest."""
        return {
            "reference": self.sae.recipe.match_l0,
            "target_l0": self.target,
            "l0": self.closest.l0,
            "l1": self.closest.l1,
            "tries": len(self.tries),
            "within_tolerance": self.found,
        }

    @property
    def outcome(self) -> dict[str, Any]:
        """What is published of the search: the target and every try."""
        return {"target_l0": self.target, "tries": [asdict(tried) for tried in self.tries]}

    def record(self, member: InTraining, l0: float | None) -> None:
        """Add a try whose weights and log are in its folder."""
        resets, seconds = member.trainer.resets, member.seconds
        l1 = member.job.recipe.l1
        self.tries.append(Try(l1=l1, l0=l0, resets=resets, seconds=seconds, stopped=member.stopped))
        if self.kept == member.job.folder:
            names = () if l0 is None else (CONFIG, WEIGHTS, TRAINING_LOG)
            self.kept_files = {name: sha256_file(self.kept / name) for name in names}
        content = sealed({**self.outcome, "kept": self.kept_files})
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


def _record(path: Path) -> dict[str, Any]:
    """The record of a search. Raises ValueError for one that is not as it was written."""
    known: dict[str, Any] = json.loads(path.read_bytes())
    if not is_sealed(known):
        raise ValueError(f"{path} does not match its seal")
    return known


def search(searches: Sequence[Search], runner: Runner, heldout: Callable[[], Iterator[torch.Tensor]]) -> None:
    """Finish every search, one try of each per round, in lockstep. `heldout` gives unscaled held-out rows.

    Raises InterruptedRunError after SIGTERM or Ctrl-C, with everything saved.
    """
    while unfinished := [one for one in searches if one.l1 is not None]:
        by_name = {str(one.sae): one for one in unfinished}
        number = max(len(one.tries) for one in unfinished) + 1
        for members in runner.run([one.next_job() for one in unfinished], f"match L0, try {number}:"):
            finished = [member for member in members if member.stopped is None]
            for member in finished:
                write_sae(member.trainer.finished(runner.scale(member.job.sae)), member.job.folder, {})
                fsync(member.job.folder / TRAINING_LOG)
            saes = [read_sae(member.job.folder).to(runner.device) for member in finished]
            measured = heldout_l0(saes, heldout())
            l0 = {str(member.job.sae): value for member, value in zip(finished, measured, strict=True)}
            for member in members:
                by_name[str(member.job.sae)].record(member, l0.get(str(member.job.sae)))
