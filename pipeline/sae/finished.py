"""Finds a finished SAE by path or name, verifies its files, and loads or exports it."""

import re
from pathlib import Path

from pipeline.artefacts.identity import KEY_LENGTH, sha256_file
from pipeline.artefacts.manifest import MANIFEST, Artefact, Manifest, read_manifest
from pipeline.artefacts.storage import LocalStorage, Storage
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError, CorruptArtefactError
from pipeline.sae.formats import CONFIG, WEIGHTS, read_sae, to_saelens
from pipeline.sae.sae import SAE

KEY = re.compile(rf"-([0-9a-f]{{{KEY_LENGTH}}})/?$")
"""The end of an artefact's folder name. A folder that was named otherwise is whatever its manifest says."""


def find(sae: str, workspace: Workspace) -> Path:
    """The folder of a finished SAE, given as its path, its folder's name or its label, such as `full-s0`.

    Raises BadInputError, naming the candidates, when there is none or more than one.
    """
    if (Path(sae) / MANIFEST).is_file():
        _manifest(LocalStorage(Path(sae)))
        return Path(sae)
    # A folder's name is <label>-<key>, and a key has no dash.
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
    """A finished SAE, verified, by its folder's path, its folder's name or its label.

    The SAE takes unscaled activations, float32 [..., D]; its latents [..., F] are in the same unit. Raises BadInputError
    when there is no such SAE or more than one, CorruptArtefactError when its files are not those of its manifest.
    """
    return read_sae(_verified(find(str(sae), workspace)))


def open_sae(artefact: Artefact, workspace: Workspace) -> SAE:
    """The SAE of a finished artefact, verified. Raises what `Workspace.verified` does."""
    folder = workspace.verified(artefact, CONFIG).parent
    workspace.verified(artefact, WEIGHTS)
    return read_sae(folder)


def export_sae(sae: Path, target: Path, card: str | None = None) -> None:
    """Verify the SAE in the artefact folder `sae` and write it into `target` for SAELens, with a card as its README.md.

    Raises CorruptArtefactError when its files are not those of its manifest, and what `to_saelens` does.
    """
    to_saelens(_verified(sae), target, sae.resolve().name, card)


def _verified(folder: Path) -> Path:
    """The folder itself. Raises BadInputError if it holds no SAE, CorruptArtefactError if a file was changed."""
    manifest = _manifest(LocalStorage(folder))
    if manifest.kind != "saes":
        raise BadInputError(f"{folder} is no SAE: its manifest says {manifest.kind}")
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file() or sha256_file(folder / name) != manifest.files[name].sha256:
            raise CorruptArtefactError(f"{folder / name} is missing or was changed; delete {folder} and train it again")
    return folder


def _manifest(sae: Storage) -> Manifest:
    manifest = read_manifest(sae, f"delete {sae} and train it again")
    if manifest is None:
        raise BadInputError(f"{sae} is no SAE: it has no {MANIFEST}")
    key = KEY.search(str(sae))
    if key and key[1] != manifest.key:
        raise CorruptArtefactError(f"{sae} holds the SAE {manifest.key}: it was renamed or swapped with another; rename it")
    return manifest
