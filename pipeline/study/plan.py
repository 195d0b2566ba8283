"""Plans a study: lists the artefacts that an experiment needs, with their keys. Reads files, makes nothing.

The `inputs` of an artefact hold everything that determines its bytes, except measured times (seconds in manifests, tokens
per second in a training log). A change of code that changes bytes must raise the format number of that artefact.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

from pipeline.artefacts.identity import fingerprint
from pipeline.artefacts.manifest import Artefact
from pipeline.errors import BadInputError
from pipeline.models.model_section import HuggingFaceModel, KnownFeatures
from pipeline.study.experiment import Experiment
from pipeline.study.origins import EVALUATION_FORMAT, Basis, planned
from pipeline.study.planned import PlannedSAE, TrainedSAE
from pipeline.texts import files, python
from pipeline.texts.text_sections import (
    SAE_BENCH_DATASETS,
    CorpusConfig,
    FilesCorpus,
    HuggingFaceCorpus,
    MixedCorpus,
    PythonCorpus,
    is_probe_folder,
)

T = TypeVar("T")

MODEL_FORMAT = 1
STORE_FORMAT = 2
PROBES_FORMAT = 2

MODEL_FILES = (".json", ".safetensors", ".model", "vocab.txt", "merges.txt")
"""Ends of the names of the files in a model's folder that are hashed: configuration, weights, every form of tokenizer."""

MOST_NAMED = 4
"""A title names up to this many arms; of more, it gives only the number."""

TRAINING_LOG = "training.jsonl"
"""The training log in the artefact of an SAE that is trained here. The report reads it."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every artefact of a study, in the order in which they are made."""

    experiment: Experiment
    model: Artefact | None
    """The model that this study makes, trained or synthetic; None when it comes from elsewhere."""
    store: Artefact
    probes: dict[str, Artefact]
    """The store of each probe data set, by the data set's name in reports."""
    llm_probing: dict[int, Artefact]
    """Results of probing the model's own activations, by layer; empty in a study without probe texts."""
    saes: tuple[PlannedSAE, ...]
    """By layer, arm, seed and sparsity."""
    model_sides: dict[tuple[str, int], Artefact] = field(default_factory=dict[tuple[str, int], Artefact])
    """What evaluations of sae-bench take from the model alone, by evaluation and layer. Made with the first SAE that needs
    it; a finished study can do without."""

    @property
    def arms_in_words(self) -> str:
        """The names of a few arms, or how many there are."""
        names = list(dict.fromkeys(sae.arm for sae in self.saes))
        return ", ".join(names) if len(names) <= MOST_NAMED else f"{len(names)} arms"

    @property
    def extracted(self) -> list[Artefact]:
        """What the extraction stage makes."""
        return [*([self.model] if self.model else []), self.store, *self.probes.values()]

    @property
    def trained(self) -> list[Artefact]:
        """What the training stage makes or copies in from outside."""
        return [sae.artefact for sae in self.saes]

    @property
    def to_train(self) -> list[TrainedSAE]:
        """The SAEs that are trained here."""
        return [sae for sae in self.saes if isinstance(sae, TrainedSAE)]

    @property
    def from_outside(self) -> list[PlannedSAE]:
        """The SAEs that others trained."""
        return [sae for sae in self.saes if not isinstance(sae, TrainedSAE)]

    @property
    def evaluated(self) -> list[Artefact]:
        """What the evaluation stage makes."""
        return [*self.llm_probing.values(), *(made for sae in self.saes for made in (sae.evaluation, *sae.apart.values()))]


def make_plan(
    experiment: Experiment,
    *,
    arms: Iterable[str] | None = None,
    seeds: Iterable[int] | None = None,
    layers: Iterable[int] | None = None,
) -> Plan:
    """The plan of an experiment, or of the part of it that `arms`, `seeds` and `layers` pick.

    Raises BadInputError for an arm, seed or layer that is not part of the study, and for texts that do not exist.
    """
    model = _model(experiment)
    identity = {"key": model.key} if model else _external_model(experiment)
    store = _store(experiment, identity)
    probes = {name: _probe_store(experiment, identity, name, dataset) for name, dataset in experiment.probes.named.items()}
    asked = {name: _asked(experiment, identity, name) for name in experiment.evaluate.saebench}
    keys = tuple(artefact.key for artefact in probes.values())
    basis = Basis(experiment=experiment, store=store, probes=keys, asked=asked)
    cells: dict[tuple[int, str, int], list[PlannedSAE]] = {}
    for sae in planned(basis):
        cells.setdefault((sae.layer, sae.arm, sae.seed), []).append(sae)
    chosen_layers = _chosen("layer", layers, [layer for layer, _, _ in cells])
    chosen_arms = _chosen("arm", arms, [arm for _, arm, _ in cells])
    chosen_seeds = _chosen("seed", seeds, [seed for _, _, seed in cells])
    return Plan(
        experiment=experiment,
        model=model,
        store=store,
        probes=probes,
        llm_probing={layer: _llm_probing(basis, layer) for layer in chosen_layers if probes},
        model_sides={(name, layer): basis.model_side(name, layer) for name in asked for layer in chosen_layers},
        saes=tuple(sae for cell in product(chosen_layers, chosen_arms, chosen_seeds) for sae in cells.get(cell, [])),
    )


def _chosen(what: str, wanted: Iterable[T] | None, declared: Iterable[T]) -> list[T]:
    known = list(dict.fromkeys(declared))
    chosen = known if wanted is None else list(dict.fromkeys(wanted))
    for value in chosen:
        if value not in known:
            raise BadInputError(f"{what} {value!r} is not part of the study, which has {known}")
    return chosen


def _model(experiment: Experiment) -> Artefact | None:
    model = experiment.model
    if isinstance(model, HuggingFaceModel):
        return None
    inputs: dict[str, Any] = {"format": MODEL_FORMAT, "model": model.canonical()}
    if not isinstance(model, KnownFeatures):
        inputs |= {"context": experiment.store.context, "corpus": _corpus(experiment.corpus)}
    return Artefact(kind="models", label=model.name, inputs=inputs)


def _external_model(experiment: Experiment) -> dict[str, Any]:
    model = experiment.model
    assert isinstance(model, HuggingFaceModel)
    folder = Path(model.name)
    if folder.is_dir():
        counted = [(path.name, path) for path in sorted(folder.iterdir()) if path.name.endswith(MODEL_FILES)]
        for _, path in counted:
            if not path.exists():
                raise BadInputError(f"{path} is a link to nothing: restore what it links to, or remove it")
        return {"content": fingerprint(counted), "dtype": model.dtype}
    return model.canonical(only=("name", "revision", "dtype"))


def _corpus(corpus: CorpusConfig) -> dict[str, Any]:
    if isinstance(corpus, MixedCorpus):
        return {"source": corpus.source, "parts": [{**_corpus(part), "weight": part.weight} for part in corpus.parts]}
    if isinstance(corpus, PythonCorpus):
        return {"source": "python", "content": python.fingerprint()}
    if isinstance(corpus, FilesCorpus):
        content = files.corpus_fingerprint(corpus)
        return {"source": "files", "content": content, "text_column": corpus.text_column}
    return corpus.canonical()


def _model_label(experiment: Experiment) -> str:
    return Path(experiment.model.name).name


def _store(experiment: Experiment, model: dict[str, Any]) -> Artefact:
    corpus = experiment.corpus
    corpus_label = Path(corpus.name).name if isinstance(corpus, HuggingFaceCorpus) else corpus.source
    inputs: dict[str, Any] = {
        "format": STORE_FORMAT,
        "model": model,
        "corpus": _corpus(experiment.corpus),
        "store": experiment.store.canonical(),
    }
    if experiment.store.mode == "stream":  # which shards the store has
        inputs["kept"] = experiment.train.canonical(only=("heldout_shards", "heldout_within", "window_shards"))
    label = "-".join(dict.fromkeys((_model_label(experiment), corpus_label)))  # "synthetic" names both; once is enough
    return Artefact(kind="stores", label=label, inputs=inputs)


def _probe_store(experiment: Experiment, model: dict[str, Any], name: str, dataset: str) -> Artefact:
    store, probes = experiment.store, experiment.probes
    inputs = {
        "format": PROBES_FORMAT,
        "model": model,
        "dataset": name,
        "content": _probe_content(dataset),
        "probes": probes.canonical(without=("datasets",)),
        "store": store.canonical(only=("layers", "forward_batch", "dtype", "codec", "shard_rows", "chunk_rows")),
    }
    return Artefact(kind="probes", label=f"{name}-{_model_label(experiment)}", inputs=inputs)


def _probe_content(dataset: str) -> str | None:
    if is_probe_folder(dataset):
        return files.probe_fingerprint(Path(dataset))
    if dataset in python.TASKS:
        return python.fingerprint()
    if dataset in SAE_BENCH_DATASETS:
        return None  # sae-bench's loaders pin no revision, so only the name identifies it
    known = ", ".join([*SAE_BENCH_DATASETS, *python.TASKS])
    raise BadInputError(
        f"probes.datasets: {dataset!r} is neither a folder with train.parquet and test.parquet nor one of {known}"
    )


def _asked(experiment: Experiment, model: dict[str, Any], name: str) -> dict[str, Any]:
    store = experiment.store.canonical(only=("context", "forward_batch"))
    return {"model": model, "store": store, **experiment.saebench.inputs(name)}


def _llm_probing(basis: Basis, layer: int) -> Artefact:
    inputs = {
        "format": EVALUATION_FORMAT,
        "probes": basis.probes,
        "layer": layer,
        **basis.experiment.evaluate.canonical(only=("k_values", "probe_draws")),
        "seed": basis.experiment.probes.seed,
    }
    return Artefact(kind="evaluations", label=f"llm-layer{layer}", inputs=inputs)
