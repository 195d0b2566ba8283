"""Runs the extraction stage: fills the activation store and every probe store of a study with one model in memory."""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError
from pipeline.extract import fill
from pipeline.extract.estimate import describe
from pipeline.extract.new_stores import check_rows, probe_store, write_corpus_store
from pipeline.extract.relatives import Relatives
from pipeline.extract.shards import Text, run_shard
from pipeline.extract.synthetic_rows import synthetic_rows, synthetic_store
from pipeline.models.access import check_available
from pipeline.models.language import ResidualStream
from pipeline.models.model_section import HuggingFaceModel, KnownFeatures, SAELensModel, SyntheticModel, TinyModel
from pipeline.models.saelens_model import make_saelens_model
from pipeline.models.synthetic import make_synthetic_model
from pipeline.runtime.compatibility import keep_freed_memory
from pipeline.runtime.devices import best_device
from pipeline.store import format as fmt
from pipeline.store.writer import InPlace, ShardWriter
from pipeline.study.cutting import part_sizes
from pipeline.study.plan import Plan
from pipeline.study.study_model import open_study_model, open_synthetic_model
from pipeline.texts import packing
from pipeline.texts.corpus import corpus_texts
from pipeline.texts.text_sections import SyntheticCorpus


def extract(plan: Plan, workspace: Workspace, *, deep: bool = False) -> list[Artefact]:
    """Make what is missing or damaged of the model, the activation store and the probe stores; returns what was made.

    A finished store is repaired when one of its files is missing or has another size; with `deep`, also when a checksum does
    not match. Raises InterruptedRunError after SIGTERM; the same call then goes on.
    """
    extraction = Extraction(plan, workspace)
    made = extraction.make_model()
    work = extraction.prepare(deep=deep)
    for path, shards in work.items():
        extraction.write({path: shards})
        made += extraction.finish([path])
    return made


Work = dict[str, list[int]]
"""The missing shards of every unfinished store, by the store's path."""


def shares(work: Work, workers: int) -> list[Work]:
    """The same work in parts, which so many workers take when they are free; at the end, single shards."""
    every = iter([(path, shard) for path, shards in work.items() for shard in shards])
    parts: list[Work] = []
    for size in part_sizes(sum(map(len, work.values())), workers):
        part: Work = {}
        for path, shard in islice(every, size):
            part.setdefault(path, []).append(shard)
        parts.append(part)
    return parts


GPU_WRITERS = 3
"""Shards that are written at a time while a GPU computes."""


class Extraction:
    """The stage in steps. Several processes can share the step `write`. The model is opened when it is first needed."""

    def __init__(self, plan: Plan, workspace: Workspace):
        self.plan, self.workspace = plan, workspace
        self.stores = {artefact.path: artefact for artefact in (plan.store, *plan.probes.values())}
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Seconds spent on each store, by its path."""

    def make_model(self) -> list[Artefact]:
        """Train or draw the study's own model, if it has one that is missing; returns what was made."""
        model = self.plan.model
        return [model] if model and _make_model(self.plan, model, self.workspace) else []

    def prepare(self, *, deep: bool = False) -> Work:
        """Lay out each store or repair it; return the shards that are missing. With `deep`, compare every checksum first."""
        model = self.plan.experiment.model
        if not fmt.is_laid_out(self.workspace.storage(self.plan.store)):
            if isinstance(model, HuggingFaceModel):
                check_available(model)  # before the estimate, which is of no use for a model that cannot be loaded
            check_rows(self.plan, self.plan.experiment.store.tokens)
            print(describe(self.plan), file=sys.stderr)
        work: Work = {}
        for path, artefact in self.stores.items():
            started = time.monotonic()
            storage = self.workspace.storage(artefact)
            with self.workspace.lock(artefact):
                finished = fill.mend(artefact, self.workspace, deep=deep)
                if not finished and not fmt.is_laid_out(storage):
                    self._tell_of_relatives(artefact, self._lay_out(path))
            if not finished:
                work[path] = ShardWriter(storage).missing()
            self.seconds[path] += time.monotonic() - started
        return work

    def write(self, work: Work) -> None:
        """Make and commit shards. Raises InterruptedRunError after SIGTERM, with the shard in hand committed."""
        keep_freed_memory()
        for path, shards in work.items():
            started = time.monotonic()
            self._fill(self.stores[path], shards)
            self.seconds[path] += time.monotonic() - started

    def finish(self, paths: Sequence[str], seconds: Mapping[str, float] | None = None) -> list[Artefact]:
        """Publish stores whose shards are all committed, and return them. `seconds` is the time others spent on each."""
        for path in paths:
            spent = self.seconds[path] + (seconds or {}).get(path, 0.0)
            fill.publish(self.stores[path], self.workspace, spent)
        return [self.stores[path] for path in paths]

    @cached_property
    def model(self) -> ResidualStream:
        """The study's language model, up to its deepest layer. Raises BadInputError if its tokenizer is of a larger one."""
        model = open_study_model(self.plan, self.workspace)
        _check_tokens(model, max(packing.padding_ids(model.tokenizer), default=0))
        return model

    @cached_property
    def make_rows(self) -> Callable[[int, fmt.Layout, Text], fmt.ShardRows]:
        """Makes the rows of a shard, from the language model or from the synthetic model's features. Opens the model."""
        if isinstance(self.plan.experiment.model, KnownFeatures):
            return partial(synthetic_rows, truth=open_synthetic_model(self.plan, self.workspace))
        return partial(run_shard, model=self.model, forward_batch=self.plan.experiment.store.forward_batch)

    def _lay_out(self, path: str) -> fmt.Layout:
        corpus, storage = self.plan.experiment.corpus, self.workspace.storage(self.stores[path])
        datasets = {artefact.path: dataset for dataset, artefact in self.plan.probes.items()}
        if path not in datasets and not isinstance(corpus, SyntheticCorpus):
            check = partial(_check_tokens, self.model)
            return write_corpus_store(self.plan, self.workspace, corpus, self.model.tokenizer, check)
        if path in datasets:
            new = probe_store(self.plan, datasets[path], self.model.tokenizer)
            _check_tokens(self.model, int(new.sequences.tokens_SL.max()))
        else:
            new = synthetic_store(self.plan)
        fmt.create(storage, new)
        return new.layout

    def _tell_of_relatives(self, artefact: Artefact, layout: fmt.Layout) -> None:
        heldout_within = self.plan.experiment.train.heldout_within
        for remark in Relatives(artefact, self.workspace, layout).remarks(heldout_within):
            print(f"{artefact.label}: {remark}", file=sys.stderr)

    def _fill(self, artefact: Artefact, shards: Sequence[int]) -> None:
        if not shards:
            return
        writer = ShardWriter(self.workspace.storage(artefact))
        sequences, relatives = fmt.StoredSequences(writer.storage), Relatives(artefact, self.workspace, writer.layout)
        if not relatives:
            _ = self.make_rows  # opens the model before the progress bar starts; with relatives it may not be needed
        experiment = self.plan.experiment
        # A GPU makes a shard faster than one thread writes it; the cores of a CPU are busy making the next one.
        on_gpu = not isinstance(experiment.model, KnownFeatures) and best_device(experiment.run.device).type != "cpu"
        with fill.filling(artefact, self.workspace, writer, shards, GPU_WRITERS if on_gpu else 1) as filling:
            for shard in filling.claimed():
                filling.commit(shard, *self._rows(shard, writer, sequences, relatives))

    def _rows(
        self, shard: int, writer: ShardWriter, sequences: Text, relatives: Relatives
    ) -> tuple[fmt.ShardRows, dict[int, InPlace]]:
        """The rows of a shard that no other store has, and the layers that one has, whose files are then in place."""
        layout = writer.layout
        if not relatives:
            return self.make_rows(shard, layout, sequences), {}
        passage = sequences.passage(*layout.shard_range(shard))
        fields, there = relatives.take_over(shard, passage, writer.storage)
        missing = tuple(layer for layer in layout.layers if layer not in there)
        if not missing:
            return fmt.ShardRows(layers={}, fields=fields), there
        return self.make_rows(shard, layout.model_copy(update={"layers": missing}), sequences), there


def row_maker(plan: Plan, workspace: Workspace) -> Callable[[int], fmt.ShardRows]:
    """Makes the rows of any shard of a study's store, which is laid out: those of a stream. Opens the model."""
    keep_freed_memory()
    storage, make_rows = workspace.storage(plan.store), Extraction(plan, workspace).make_rows
    layout, sequences = fmt.read_layout(storage), fmt.StoredSequences(storage)
    return lambda shard: make_rows(shard, layout, sequences)


def _check_tokens(model: ResidualStream, largest: int) -> None:
    """Raise BadInputError for a token id that the model's embedding does not have."""
    entries = model.model.get_input_embeddings().num_embeddings
    if largest >= entries:
        raise BadInputError(
            f"the tokenizer of {model.name} gives token {largest}, and the model's embedding ends at {entries - 1}: "
            f"use the tokenizer that the model was trained with, without added tokens such as [PAD]"
        )


def _make_model(plan: Plan, model: Artefact, workspace: Workspace) -> bool:
    """Make the study's own model if it is missing; returns True if this call made it."""
    if workspace.manifest(model):
        return False
    with workspace.lock(model) as folder:
        if workspace.manifest(model):
            return False
        workspace.publish(model, facts=_made(plan, folder))
    return True


def _made(plan: Plan, folder: Path) -> dict[str, Any]:
    model, text, context = plan.experiment.model, plan.experiment.corpus, plan.experiment.store.context
    if isinstance(model, SyntheticModel):
        return make_synthetic_model(model, folder)
    if isinstance(model, SAELensModel):
        return make_saelens_model(model, folder)
    from pipeline.models.tiny import train_tiny_model

    assert isinstance(model, TinyModel)
    assert not isinstance(text, SyntheticCorpus)
    return train_tiny_model(model, corpus_texts(text), context, folder)
