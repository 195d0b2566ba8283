"""The extraction stage: one model in memory, the activation store and every probe store of the study filled from it."""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.workspace import Workspace
from pipeline.extract import fill
from pipeline.extract.estimate import describe
from pipeline.extract.shards import ShardRows, run_shard
from pipeline.extract.synthetic_rows import synthetic_rows, synthetic_store
from pipeline.models.access import check_available
from pipeline.models.language import ResidualStream
from pipeline.models.model_section import HuggingFaceModel, SyntheticModel, TinyModel
from pipeline.models.synthetic import GroundTruth, make_synthetic_model
from pipeline.runtime.compatibility import keep_freed_memory
from pipeline.store import format as fmt
from pipeline.store.documents import SPLITS
from pipeline.study.plan import Plan
from pipeline.study.study_model import open_study_model, open_synthetic_model
from pipeline.texts import packing
from pipeline.texts.corpus import corpus_texts
from pipeline.texts.labelled import load_texts
from pipeline.texts.text_sections import SyntheticCorpus


def extract(plan: Plan, workspace: Workspace, *, deep: bool = False) -> list[Artefact]:
    """Make what is missing or damaged of the model, the activation store and the probe stores; returns what was made.

    A finished store whose files are not all there in their right sizes is repaired; with `deep`, so is one in which a
    checksum does not match.
    """
    extraction = Extraction(plan, workspace)
    made = extraction.make_model()
    work = extraction.prepare(deep=deep)
    for path, shards in work.items():
        extraction.write({path: shards})
        made += extraction.finish([path])
    return made


Work = dict[str, list[int]]
"""Path of every store that is not finished, and the shards it misses."""


def shares(work: Work, parts: int) -> list[Work]:
    """The same work in at most `parts` parts, each with an equal run of every store's shards."""
    shared: list[Work] = []
    for part in range(parts):
        runs = {
            path: shards[len(shards) * part // parts : len(shards) * (part + 1) // parts] for path, shards in work.items()
        }
        shared.append({path: run for path, run in runs.items() if run})
    return [share for share in shared if share]


class Extraction:
    """The stage in its steps, for those who share them out; the model is opened when first needed."""

    def __init__(self, plan: Plan, workspace: Workspace):
        self.plan, self.workspace = plan, workspace
        self.stores = {artefact.path: artefact for artefact in (plan.store, *plan.probes.values())}
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Spent on each store."""

    def make_model(self) -> list[Artefact]:
        """Train or draw the study's own model, if it has one that is missing; returns what was made."""
        model = self.plan.model
        return [model] if model and _make_model(self.plan, self.workspace) else []

    def prepare(self, *, deep: bool = False) -> Work:
        """Lay out every store, or mend it; returns what is left to do."""
        model = self.plan.experiment.model
        if not fmt.is_laid_out(self.workspace.storage(self.plan.store)):
            if isinstance(model, HuggingFaceModel):
                check_available(model)  # nobody wants to know what it would take without
            print(describe(self.plan), file=sys.stderr)
        new_stores = {self.plan.store.path: partial(_corpus_store, self)}
        new_stores |= {artefact.path: partial(_probe_store, self, name) for name, artefact in self.plan.probes.items()}
        work: Work = {}
        for path, new_store in new_stores.items():
            started = time.monotonic()
            missing = fill.prepare(self.stores[path], self.workspace, new_store=new_store, deep=deep)
            if missing is not None:
                work[path] = missing
            self.seconds[path] += time.monotonic() - started
        return work

    def write(self, work: Work) -> None:
        """Make and commit shards."""
        keep_freed_memory()
        for path, shards in work.items():
            started = time.monotonic()
            fill.write_shards(self.stores[path], self.workspace, shards, rows_of=self.rows_of)
            self.seconds[path] += time.monotonic() - started

    def finish(self, paths: Sequence[str], seconds: Mapping[str, float] | None = None) -> list[Artefact]:
        """Publish stores whose shards are all committed; `seconds` is what others spent on each. Returns the stores."""
        for path in paths:
            spent = self.seconds[path] + (seconds or {}).get(path, 0.0)
            fill.finish(self.stores[path], self.workspace, spent)
        return [self.stores[path] for path in paths]

    @cached_property
    def model(self) -> ResidualStream:
        """The study's language model, up to its deepest layer."""
        return open_study_model(self.plan, self.workspace)

    @cached_property
    def truth(self) -> GroundTruth:
        """The features of the study's synthetic model."""
        return open_synthetic_model(self.plan, self.workspace)

    def rows_of(self, layout: fmt.Layout, sequences: fmt.Sequences) -> Callable[[int], ShardRows]:
        """What makes the rows of any shard of a store."""
        if isinstance(self.plan.experiment.model, SyntheticModel):
            return partial(synthetic_rows, self.truth, layout, sequences)
        forward_batch = self.plan.experiment.store.forward_batch
        return partial(run_shard, layout=layout, sequences=sequences, model=self.model, forward_batch=forward_batch)


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
    from pipeline.models.tiny import train_tiny_model

    model, text, context = plan.experiment.model, plan.experiment.corpus, plan.experiment.store.context
    assert isinstance(model, TinyModel)
    assert not isinstance(text, SyntheticCorpus)
    return train_tiny_model(model, corpus_texts(text), context, folder)


def _corpus_store(source: Extraction) -> fmt.NewStore:
    plan = source.plan
    config, text = plan.experiment.store, plan.experiment.corpus
    if isinstance(text, SyntheticCorpus):
        return synthetic_store(plan)
    tokenizer = source.model.tokenizer
    sequences = packing.pack(corpus_texts(text), tokenizer, context=config.context, rows=config.tokens)
    rows = min(int(sequences.row_offsets[-1]), config.tokens)
    layout = _layout(plan.store, source, rows, "shuffled", config.seed, sorted(set(tokenizer.all_special_ids)), ())
    return fmt.NewStore(layout=layout, sequences=sequences)


def _probe_store(source: Extraction, dataset: str) -> fmt.NewStore:
    plan = source.plan
    config, tokenizer = plan.experiment.probes, source.model.tokenizer
    by_split = dict(zip(SPLITS, load_texts(dataset, config), strict=True))
    classes = tuple(by_split["train"])
    documents = [
        (text, label, split)
        for split, name in enumerate(SPLITS)
        for label, class_name in enumerate(classes)
        for text in by_split[name][class_name]
    ]
    texts, label, split = zip(*documents, strict=True)
    special_ids = packing.padding_ids(tokenizer)
    sequences = packing.pad(texts, tokenizer, context=config.context, special_ids=special_ids)
    layout = _layout(plan.probes[dataset], source, int(sequences.row_offsets[-1]), "document", 0, special_ids, classes)
    labels = {"label": np.array(label, dtype=np.int32), "split": np.array(split, dtype=np.uint8)}
    return fmt.NewStore(layout=layout, sequences=sequences, labels=labels)


def _layout(
    artefact: Artefact,
    source: Extraction,
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
        max_norm=config.max_norm if row_order == "shuffled" else None,
        provenance=dict(artefact.inputs),
        classes=classes,
    )
