"""Finished SAEs for use outside a study: found by path or name, verified, loaded or written in another library's format."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from pydantic import ValidationError

from pipeline.artefacts.identity import sha256_file
from pipeline.artefacts.manifest import MANIFEST, Artefact, Manifest
from pipeline.artefacts.storage import LocalStorage, Storage, explained, fsync
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError, CorruptArtefactError
from pipeline.sae.sae import CONFIG, SAE, WEIGHTS


def find(sae: str, workspace: Workspace) -> Path:
    """The folder of a finished SAE, given as its path, its folder's name or its label, such as `full-s0`.

    Raises BadInputError, naming the candidates, when there is none or more than one.
    """
    if (Path(sae) / MANIFEST).is_file():
        return Path(sae)
    # <label>-<key>, and no key holds a dash.
    labels = {name: name.rpartition("-")[0] for name in workspace.finished("saes")}
    found = [name for name, label in labels.items() if sae in (name, label)]
    if not found:
        known = ", ".join(dict.fromkeys(labels.values())) or "none"
        raise BadInputError(f"no finished SAE {sae!r}, neither as a path nor in {workspace.root}, which has: {known}")
    manifests = {name: _manifest(workspace.place(f"saes/{name}")) for name in found}
    if len(found) > 1:
        candidates = ", ".join(f"{name} (layer {manifest.inputs['layer']})" for name, manifest in manifests.items())
        raise BadInputError(f"{sae!r} is more than one SAE, name one of: {candidates}")
    ((name, manifest),) = manifests.items()
    artefact = Artefact(kind="saes", label=labels[name], inputs=manifest.inputs)
    return workspace.fetched(artefact) if workspace.remote else workspace.folder(artefact)


def load_sae(sae: Path | str, workspace: Workspace) -> SAE:
    """A finished SAE, verified, given as `find` takes it.

    It reads activations as the model puts them out, float32 [..., D], unscaled; latents [..., F] have their unit.
    Raises BadInputError when there is none or more than one of that name, CorruptArtefactError when it is not what its
    manifest says.
    """
    return SAE.load(_verified(find(str(sae), workspace)) / WEIGHTS)


def to_saelens(sae: Path, target: Path) -> None:
    """Write the SAE of the artefact folder `sae` into `target`, for `sae_lens.SAE.load_from_disk`; all of it or nothing.

    Raises CorruptArtefactError when the SAE is not what its manifest says, BadInputError when it is none or when `target`
    holds something already.
    """
    _verified(sae)
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise BadInputError(f"{target} exists and is not an empty folder; name another one")
    metadata = json.loads((sae / CONFIG).read_text(encoding="utf-8"))["metadata"]
    with explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=".export-") as temporary:
        folder = Path(temporary) / "sae"
        folder.mkdir()
        SAE.load(sae / WEIGHTS).save(folder, metadata | {"artefact": sae.resolve().name})
        for path in (folder / CONFIG, folder / WEIGHTS, folder):
            fsync(path)
        folder.replace(target)
    fsync(target.parent)


def _verified(folder: Path) -> Path:
    """The folder itself, if it holds an SAE that is what its manifest says."""
    manifest = _manifest(LocalStorage(folder))
    if manifest.kind != "saes":
        raise BadInputError(f"{folder} is no SAE: its manifest says {manifest.kind}")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file() or sha256_file(folder / name) != manifest.files[name].sha256:
            raise CorruptArtefactError(f"{folder / name} is missing or was changed; delete {folder} and train it again")
    return folder


def _manifest(sae: Storage) -> Manifest:
    try:
        return Manifest.model_validate_json(sae.read(MANIFEST))
    except ValidationError:
        raise CorruptArtefactError(f"{sae}/{MANIFEST} cannot be read; delete {sae} and train it again") from None
