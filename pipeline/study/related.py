"""Finds stores that are related: they differ in nothing but how many tokens and which layers they have.

A shard of both then has the same rows, and a file of a layer the same bytes (docs/store-format.md, "Growing").
"""

from collections.abc import Iterator
from typing import Any, cast

from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.storage import Storage
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import CorruptArtefactError
from pipeline.store import format as fmt

GROWING = ("tokens", "layers", "mode")
"""The store's settings in which relatives may differ."""


def related_stores(artefact: Artefact, workspace: Workspace, layout: fmt.Layout) -> Iterator[tuple[Storage, fmt.Layout]]:
    """The other stores of a workspace that are related to one with this layout, finished or not."""
    for name in workspace.place(artefact.kind).folders():
        if name == artefact.name:
            continue
        storage = workspace.place(f"{artefact.kind}/{name}")
        try:
            other = fmt.read_layout(storage)
        except CorruptArtefactError:
            continue
        # With `max_norm`, which rows stay depends on all layers together.
        same_layers = set(other.layers) == set(layout.layers)
        if _fixed(other) == _fixed(layout) and (layout.max_norm is None or same_layers):
            yield storage, other


def _fixed(layout: fmt.Layout) -> dict[str, Any]:
    """All that a store says of itself but how far it has grown, and which shards it keeps."""
    traits = layout.model_dump(exclude={"rows", "layers", "kept"})
    settings = layout.provenance.get("store")
    if isinstance(settings, dict):
        fixed = {name: value for name, value in cast("dict[str, Any]", settings).items() if name not in GROWING}
        traits["provenance"] = {**layout.provenance, "store": fixed, "kept": None}
    return traits
