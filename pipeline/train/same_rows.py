"""Takes over SAEs that were trained on the same rows under another name: those of a store with other layers beside theirs.

The key of an SAE covers its store, and the key of a store all its layers. With another layer, an SAE of an old one has
another name; the commits of both stores say that its rows are the same.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from pipeline.artefacts.identity import key_of
from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.storage import LocalStorage
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import CorruptArtefactError
from pipeline.store import format as fmt
from pipeline.store.reader import ActivationStore
from pipeline.study.planned import TrainedSAE
from pipeline.study.related import related_stores


def take_over(
    saes: Sequence[TrainedSAE], own: Artefact, store: ActivationStore, workspace: Workspace
) -> Iterator[TrainedSAE]:
    """Publish each SAE that was trained on the same rows of a related store, and yield it. `own` is the artefact of `store`.

    SAEs that others are matched to come first in `saes`.
    """
    for storage, layout in related_stores(own, workspace, store.layout):
        try:
            other = ActivationStore(storage)
        except CorruptArtefactError:  # also one that is not finished
            continue
        same = {layer for layer in layout.layers if layer in store.layout.layers and _same_rows(store, other, layer)}
        for sae in (sae for sae in saes if sae.layer in same):
            if _published(sae, key_of(layout.provenance), workspace):
                yield sae


def _same_rows(store: ActivationStore, other: ActivationStore, layer: int) -> bool:
    """Whether two stores have the same rows of a layer, in the same order: the same checksums of every chunk.

    Of what is streamed, nothing can tell.
    """
    if store.layout.kept is not None or other.layout.kept is not None:
        return False
    one, two = (
        {shard: (commit.rows, commit.files[fmt.layer_file(layer, shard)]) for shard, commit in each.commits.items()}
        for each in (store, other)
    )
    return one == two and all(check.chunks for _, check in one.values())


def _published(sae: TrainedSAE, store_key: str, workspace: Workspace) -> bool:
    """Publish an SAE as the one of the other store, if that is finished and this one is not; True if it was."""
    twin = replace(sae.artefact, inputs=_inputs(sae, store_key))
    target = [sae.matched_to.artefact] if sae.matched_to else []
    if workspace.manifest(twin) is None or not all(map(workspace.manifest, target)):
        return False
    with workspace.lock(sae.artefact) as folder:
        manifest = workspace.manifest(twin)
        if manifest is None or workspace.manifest(sae.artefact):
            return False
        workspace.reopen(sae.artefact)  # a stale one would look damaged while its files are replaced
        for name in manifest.files:
            path = workspace.verified(twin, name, manifest)
            if not LocalStorage(folder).share(name, LocalStorage(path.parent), path.name):
                LocalStorage(folder).write(name, path.read_bytes())
        parents = workspace.fingerprints(target)
        workspace.publish(sae.artefact, files=manifest.files, parents=parents, facts=manifest.facts)
    return True


def _inputs(sae: TrainedSAE, store_key: str) -> Mapping[str, Any]:
    """The inputs of the same SAE on another store."""
    matched_to = {"matched_to": key_of(_inputs(sae.matched_to, store_key))} if sae.matched_to else {}
    return {**sae.artefact.inputs, "store": store_key, **matched_to}
