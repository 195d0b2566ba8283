"""Copies unfinished work to a workspace on an object store, so that another machine can go on with it."""

from pathlib import Path

from pydantic import BaseModel, ValidationError

from pipeline.artefacts.local_files import remove_tree
from pipeline.artefacts.local_storage import LocalStorage
from pipeline.artefacts.manifest import MANIFEST
from pipeline.artefacts.object_storage import ObjectStorage

RECORD = "progress.json"


class _Record(BaseModel):
    """Whose work it is, and what belongs to it. Written last."""

    domain: str
    """Of the machine, as `Leases` has it: its own folder is at least as far."""
    files: list[str]


class Unfinished:
    """The unfinished work in one artefact's folder on this machine, and its copy on the object store.

    Call everything with the artefact's lock held. Whoever reads the files checks them: checkpoints and logs hold hashes.
    """

    def __init__(self, folder: Path, within: Path, storage: ObjectStorage, domain: str):
        self.folder, self.within, self.storage, self.domain = folder, within, storage, domain
        self.here = LocalStorage(folder, within=within)
        self._copied: dict[str, tuple[int, int]] = {}
        """Bytes and time of every file as it was copied last."""

    def keep(self) -> None:
        """Copy what is new or changed, then remove what is gone. Killed in between, the work before can still be resumed."""
        names = [name for name in self.here.sizes() if name != MANIFEST]
        for name in sorted(names, key=lambda name: (name.endswith(".json"), name)):  # records vouch for the other files
            stat = (self.folder / name).stat()
            if self._copied.get(name) != (stat.st_size, stat.st_mtime_ns):
                self.storage.write(name, self.here.read(name))
                self._copied[name] = (stat.st_size, stat.st_mtime_ns)
        self.storage.write(RECORD, _Record(domain=self.domain, files=names).model_dump_json().encode())
        for name in self.storage.sizes().keys() - {*names, RECORD, MANIFEST}:
            self.storage.delete(name)
            self._copied.pop(name, None)

    def restore(self) -> None:
        """Replace this machine's folder by the work of another machine, if that was the last to work on it."""
        try:
            record = _Record.model_validate_json(self.storage.read(RECORD))
        except (FileNotFoundError, ValidationError):
            return
        if record.domain == self.domain and self.here.sizes():
            return
        remove_tree(self.folder, self.within)
        for name in record.files:
            try:
                self.here.write(name, self.storage.read(name))
            except FileNotFoundError:
                continue  # its record does not vouch for it then, and the work begins before it
