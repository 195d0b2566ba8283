"""What a case is: a fault with a name, and a folder of its own to happen in."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from campaign.judge import Verdict, files

Run = Callable[["Place"], Verdict]


@dataclass(frozen=True)
class Case:
    """One fault. Its name, after the class's, is unique."""

    kind: str
    name: str
    run: Run


@dataclass(frozen=True)
class Place:
    """The folder of a case: a workspace, and beside it what nobody may touch."""

    folder: Path

    @property
    def workspace(self) -> Path:
        return self.folder / "workspace"

    @property
    def outside(self) -> Path:
        """A folder of somebody else."""
        return self.folder / "outside"

    @property
    def log(self) -> Path:
        """Where the injector says what it hit."""
        return self.folder / "hit"

    def fill(self, source: Path) -> Path:
        """Copy a workspace here."""
        shutil.copytree(source, self.workspace, symlinks=True)
        return self.workspace

    def hit(self) -> str:
        """The operation that was hit, "" if none was."""
        return self.log.read_text() if self.log.exists() else ""


def judged_in(folder: Path, case: Case) -> Verdict:
    """Run a case in an empty folder; what it changed outside its workspace is its verdict whatever else came of it."""
    shutil.rmtree(folder, ignore_errors=True)
    place = Place(folder)
    place.outside.mkdir(parents=True)
    (place.outside / "precious").write_text("of somebody else")
    try:
        verdict = case.run(place)
        if files(place.outside).get("precious") != b"of somebody else" or len(files(place.outside)) != 1:
            return Verdict("outside", f"{sorted(files(place.outside))}; else {verdict.outcome}: {verdict.detail}")
        return verdict
    except Exception as error:  # one broken case does not end a campaign
        return Verdict("broken-case", repr(error)[:300])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


Library = Callable[[Path], Iterator[Case]]
"""All cases of a class, given the folder for studies."""
