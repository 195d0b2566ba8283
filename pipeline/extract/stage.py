"""The extraction stage: one model in memory, the activation store and every probe store of the study filled from it."""

import sys
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.experiment import HuggingFaceModel, SyntheticCorpus, SyntheticModel, TinyModel
from pipeline.extract import corpus, probes
from pipeline.extract.estimate import describe
from pipeline.extract.model import ResidualStream, open_model
from pipeline.extract.shards import ShardRows, run_shard
from pipeline.extract.synthetic import make_synthetic_model, open_synthetic_model, synthetic_rows, synthetic_store
from pipeline.ground_truth import GroundTruth
from pipeline.plan import Plan
from pipeline.progress import progress
from pipeline.store import format as fmt
from pipeline.store.documents import SPLITS
from pipeline.store.reader import ActivationStore
from pipeline.store.writer import ShardWriter
from pipeline.workspace import Artefact, Workspace


def extract(plan: Plan, workspace: Workspace) -> list[Artefact]:
    """Make what is missing of the model, the activation store and the probe stores; returns what was made."""
    if workspace.manifest(plan.store) is None:
        print(describe(plan), file=sys.stderr)
    source = _Source(plan, workspace)
    made: list[Artefact] = []
    if plan.model and _make_model(plan, workspace):
        made.append(plan.model)
    if _fill_store(plan.store, workspace, source, partial(_corpus_store, plan, source)):
        made.append(plan.store)
    for dataset, artefact in plan.probes.items():
        if _fill_store(artefact, workspace, source, partial(_probe_store, plan, source, dataset)):
            made.append(artefact)
    return made


class _Source:
    """The study's model, opened when first needed."""

    def __init__(self, plan: Plan, workspace: Workspace):
        self.plan, self.workspace = plan, workspace

    @cached_property
    def model(self) -> ResidualStream:
        config, layers = self.plan.experiment.model, self.plan.experiment.store.layers
        if isinstance(config, HuggingFaceModel):
            return open_model(config, layers)
        assert self.plan.model is not None
        return ResidualStream(str(self.workspace.folder(self.plan.model)), layers=layers, dtype=config.dtype)

    @cached_property
    def truth(self) -> GroundTruth:
        return open_synthetic_model(self.plan, self.workspace)

    def rows(self, shard: int, layout: fmt.Layout, sequences: fmt.Sequences) -> ShardRows:
        if isinstance(self.plan.experiment.model, SyntheticModel):
            return synthetic_rows(self.truth, layout, sequences, shard)
        return run_shard(shard, layout, sequences, self.model, self.plan.experiment.store.forward_batch)


def _make_model(plan: Plan, workspace: Workspace) -> bool:
    assert plan.model is not None
    if workspace.manifest(plan.model):
        return False
    with workspace.lock(plan.model) as folder:
        if workspace.manifest(plan.model):
            return False
        config = plan.experiment.model
        facts = make_synthetic_model(config, folder) if isinstance(config, SyntheticModel) else _train_model(plan, folder)
        workspace.publish(plan.model, facts=facts)
    return True


def _train_model(plan: Plan, folder: Path) -> dict[str, Any]:
    from pipeline.extract.tiny_model import train_tiny_model

    model, text, context = plan.experiment.model, plan.experiment.corpus, plan.experiment.store.context
    assert isinstance(model, TinyModel)
    assert not isinstance(text, SyntheticCorpus)
    return train_tiny_model(model, corpus.texts(text), context, folder)


def _fill_store(artefact: Artefact, workspace: Workspace, source: _Source, new_store: Callable[[], fmt.NewStore]) -> bool:
    """Bring a store to its end from wherever an earlier run left it; False when it was finished already."""
    if workspace.manifest(artefact):
        return False
    with workspace.lock(artefact) as folder:
        if workspace.manifest(artefact):
            return False
        started = time.monotonic()
        if not fmt.is_laid_out(folder):
            fmt.create(folder, new_store())
        _write_shards(artefact, folder, source)
        store = ActivationStore(folder)
        shard_data = {name for commit in store.commits for name in commit.files}
        kept = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        workspace.publish(
            artefact,
            # The commits carry a checksum of every shard; the manifest carries one of every commit.
            files=[name for name in kept if name not in shard_data and not name.endswith(".partial")],
            facts={
                "rows": store.rows,
                "bytes": store.bytes,
                "d_in": store.layout.d_in,
                "scales": {str(layer): store.scale(layer) for layer in store.layout.layers},
                "seconds": round(time.monotonic() - started, 1),
            },
        )
    return True


def _write_shards(artefact: Artefact, folder: Path, source: _Source) -> None:
    writer = ShardWriter(folder)
    layout, sequences = writer.layout, fmt.read_sequences(writer.group)
    missing = writer.missing()
    with progress(f"extract {artefact.label}", len(missing) * layout.shard_rows, "tokens") as advance:
        for shard in missing:
            rows = source.rows(shard, layout, sequences)
            writer.write(shard, rows.layers, rows.fields)
            advance(layout.shard_rows)


def _corpus_store(plan: Plan, source: _Source) -> fmt.NewStore:
    config, text = plan.experiment.store, plan.experiment.corpus
    if isinstance(text, SyntheticCorpus):
        return synthetic_store(plan)
    tokenizer = source.model.tokenizer
    sequences = corpus.pack(corpus.texts(text), tokenizer, context=config.context, rows=config.tokens)
    rows = min(int(sequences.row_offsets[-1]), config.tokens)
    layout = _layout(plan.store, source, rows, "shuffled", config.seed, sorted(set(tokenizer.all_special_ids)), ())
    return fmt.NewStore(layout=layout, sequences=sequences)


def _probe_store(plan: Plan, source: _Source, dataset: str) -> fmt.NewStore:
    config, tokenizer = plan.experiment.probes, source.model.tokenizer
    by_split = dict(zip(SPLITS, probes.load_texts(dataset, config), strict=True))
    classes = tuple(by_split["train"])
    documents = [
        (text, label, split)
        for split, name in enumerate(SPLITS)
        for label, class_name in enumerate(classes)
        for text in by_split[name][class_name]
    ]
    texts, label, split = zip(*documents, strict=True)
    sequences = corpus.pad(texts, tokenizer, context=config.context)
    layout = _layout(
        plan.probes[dataset], source, int(sequences.row_offsets[-1]), "document", 0, corpus.padding_ids(tokenizer), classes
    )
    labels = {"label": np.array(label, dtype=np.int32), "split": np.array(split, dtype=np.uint8)}
    return fmt.NewStore(layout=layout, sequences=sequences, labels=labels)


def _layout(
    artefact: Artefact,
    source: _Source,
    rows: int,
    row_order: Literal["shuffled", "document"],
    seed: int,
    special_ids: list[int],
    classes: tuple[str, ...],
) -> fmt.Layout:
    config = source.plan.experiment.store
    return fmt.Layout(
        rows=rows,
        shard_rows=config.shard_rows,
        chunk_rows=config.chunk_rows,
        layers=config.layers,
        d_in=source.model.d_in,
        dtype=config.dtype,
        codec=config.codec,
        row_order=row_order,
        seed=seed,
        special_ids=tuple(special_ids),
        provenance=dict(artefact.inputs),
        classes=classes,
    )
