"""Prepares new stores of text: reads and tokenizes the texts, and fixes the layout, before any forward pass."""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError
from pipeline.extract.new_text import NewText
from pipeline.extract.relatives import Relatives
from pipeline.store import format as fmt
from pipeline.store.batches import check_heldout, split
from pipeline.store.documents import SPLITS
from pipeline.study.experiment import Experiment
from pipeline.study.plan import Plan
from pipeline.study.sections import StoreConfig
from pipeline.texts import packing
from pipeline.texts.labelled import load_texts
from pipeline.texts.text_sections import TextCorpus

FEW_HELDOUT = 1000
"""Held-out rows below which extraction says that there are few."""


def write_corpus_store(
    plan: Plan, workspace: Workspace, corpus: TextCorpus, tokenizer: Any, check: Callable[[int], None]
) -> fmt.Layout:
    """Lay out the activation store: documents packed until they hold `store.tokens` rows.

    `check` is told the largest token of what is packed. Raises what it does, and BadInputError for unusable text.
    """
    config, storage = plan.experiment.store, workspace.storage(plan.store)
    layout = store_layout(
        config,
        rows=config.tokens,
        d_in=plan.experiment.model.d_in,
        row_order="shuffled",
        seed=config.seed,
        special_ids=packing.special_ids(tokenizer),
        provenance=plan.store.inputs,
    )
    text = NewText(storage, Relatives(plan.store, workspace, layout), tokenizer, config.context, config.tokens)
    for new in text.pack(corpus):
        check(int(new.tokens_SL.max(initial=0)))
    layout = layout.model_copy(update={"rows": min(text.packer.rows, config.tokens)})
    layout = with_kept(layout, plan.experiment)
    if layout.rows < config.tokens:
        print(
            f"{plan.store.label}: the corpus holds {layout.rows:,} rows of the {config.tokens:,} asked for (store.tokens)",
            file=sys.stderr,
        )
    check_rows(plan, layout.rows)
    text.lay_out(layout)
    return layout


def with_kept(layout: fmt.Layout, experiment: Experiment) -> fmt.Layout:
    """The layout, which in a stream says that the store keeps what is held out and the first window of the rest."""
    if experiment.store.mode == "keep":
        return layout
    recipe = experiment.train
    training, heldout = split(range(layout.shards), layout.shard_rows, recipe.heldout_shards, recipe.heldout_within)
    return layout.model_copy(update={"kept": tuple(sorted([*training[: recipe.window_shards], *heldout]))})


def check_rows(plan: Plan, rows: int) -> None:
    """Say so if an activation store of so many rows would hold out few. Raises BadInputError if it cannot be trained on."""
    size, recipe = plan.experiment.store.shard_rows, plan.experiment.train
    heldout = recipe.heldout_shards
    held = check_heldout([min(size, rows - start) for start in range(0, rows, size)], size, heldout, recipe.heldout_within)
    if held < FEW_HELDOUT:
        print(
            f"{plan.store.label}: only {held:,} of {rows:,} rows are held out (train.heldout_shards {heldout}); "
            f"FVU and L0 on fewer than {FEW_HELDOUT:,} are rough",
            file=sys.stderr,
        )


def probe_store(plan: Plan, dataset: str, tokenizer: Any) -> fmt.NewStore:
    """The store of a probe data set, by its name in the plan: each text padded, training texts first, class by class.

    Raises BadInputError for unusable texts.
    """
    probes = plan.experiment.probes
    by_split = load_texts(dataset, probes)
    classes = tuple(by_split[0])
    texts: list[str] = []
    label: list[int] = []
    split: list[int] = []
    for split_number, by_class in zip(range(len(SPLITS)), by_split, strict=True):
        for class_number, name in enumerate(classes):
            texts += by_class[name]
            label += [class_number] * len(by_class[name])
            split += [split_number] * len(by_class[name])
    special_ids = packing.padding_ids(tokenizer)
    try:
        sequences = packing.pad(texts, tokenizer, context=probes.context, special_ids=special_ids)
    except packing.NoTokensError as error:
        number = error.index
        raise BadInputError(
            f"{dataset}: a text of class {classes[label[number]]!r} for the {SPLITS[split[number]]} set has no tokens, "
            f"remove it: {texts[number][:60]!r}"
        ) from None
    layout = store_layout(
        plan.experiment.store,
        rows=sequences.rows,
        d_in=plan.experiment.model.d_in,
        row_order="document",
        special_ids=special_ids,
        provenance=plan.probes[dataset].inputs,
        classes=classes,
    )
    labels = fmt.Labels(label=np.array(label, dtype=np.int32), split=np.array(split, dtype=np.uint8))
    return fmt.NewStore(layout=layout, sequences=sequences, labels=labels)


def store_layout(
    config: StoreConfig,
    *,
    rows: int,
    d_in: int,
    row_order: Literal["shuffled", "document"],
    special_ids: Sequence[int],
    seed: int = 0,
    provenance: Mapping[str, Any],
    classes: tuple[str, ...] = (),
) -> fmt.Layout:
    """The layout of any store of a study. `max_norm` applies to shuffled rows only; rows in document order are all kept."""
    return fmt.Layout(
        rows=rows,
        shard_rows=config.shard_rows,
        chunk_rows=config.chunk_rows,
        layers=config.layers,
        d_in=d_in,
        dtype=config.dtype,
        codec=config.codec,
        row_order=row_order,
        seed=seed,
        special_ids=tuple(special_ids),
        max_norm=config.max_norm if row_order == "shuffled" else None,
        provenance=dict(provenance),
        classes=classes,
    )
