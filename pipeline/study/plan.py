"""What a study consists of: from an experiment to the artefacts it needs, and their keys. Reads files, runs nothing.

Everything that determines an artefact's bytes is in its `inputs` here, but for times: seconds in manifests, the pace in a
training log. A change of code that changes bytes must raise the format number of that artefact.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pipeline.artefacts.identity import fingerprint
from pipeline.artefacts.manifest import Artefact
from pipeline.errors import BadInputError
from pipeline.models.model_section import HuggingFaceModel, SyntheticModel
from pipeline.study.arms import recipe
from pipeline.study.experiment import Experiment
from pipeline.study.planned import PlannedSAE, TrainedSAE
from pipeline.texts import files, python
from pipeline.texts.text_sections import SAE_BENCH_DATASETS, FilesCorpus, HuggingFaceCorpus, PythonCorpus, is_probe_folder

T = TypeVar("T")

MODEL_FORMAT = 1
STORE_FORMAT = 2
PROBES_FORMAT = 2
SAE_FORMAT = 2
EVALUATION_FORMAT = 4

MODEL_FILES = (".json", ".safetensors", ".model", ".txt")
"""What of a model's folder counts: configuration, weights, and every form of tokenizer."""

MOST_NAMED = 4
"""Arms that a title names; of more it says how many."""

BASELINE = "baseline"
"""The arm on whose pairs every arm is measured."""

TRAINING_LOG = "training.jsonl"
"""The log inside the artefact of an SAE that is trained here, which the report reads."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every artefact of a study, in the order in which they are made."""

    experiment: Experiment
    model: Artefact | None
    """The model that is made here, trained or synthetic; None when the model comes from elsewhere."""
    store: Artefact
    probes: dict[str, Artefact]
    """Documents store of each probe data set, by the name that reports give it."""
    llm_probing: dict[int, Artefact]
    """Probing results of the model itself, by layer; none where there is nothing to probe."""
    saes: tuple[PlannedSAE, ...]

    @property
    def arms_in_words(self) -> str:
        """The arms, in few words."""
        names = list(dict.fromkeys(sae.arm for sae in self.saes))
        return ", ".join(names) if len(names) <= MOST_NAMED else f"{len(names)} arms"

    @property
    def extracted(self) -> list[Artefact]:
        """What the extraction stage makes."""
        return [*([self.model] if self.model else []), self.store, *self.probes.values()]

    @property
    def trained(self) -> list[Artefact]:
        """What the training stage makes."""
        return [sae.artefact for sae in self.saes]

    @property
    def to_train(self) -> list[TrainedSAE]:
        """The SAEs that are trained here."""
        return [sae for sae in self.saes if isinstance(sae, TrainedSAE)]

    @property
    def evaluated(self) -> list[Artefact]:
        """What the evaluation stage makes."""
        return [*self.llm_probing.values(), *(sae.evaluation for sae in self.saes)]


def make_plan(
    experiment: Experiment,
    *,
    arms: Iterable[str] | None = None,
    seeds: Iterable[int] | None = None,
    layers: Iterable[int] | None = None,
) -> Plan:
    """The plan of an experiment, or of the part of it that `arms`, `seeds` and `layers` pick.

    Raises BadInputError for an arm, seed or layer that is not part of the study, and for texts that are not there.
    """
    study = experiment.study
    model = _model(experiment)
    identity = {"key": model.key} if model else _external_model(experiment)
    store = _store(experiment, identity)
    probes = {name: _probe_store(experiment, identity, name, dataset) for name, dataset in experiment.probes.named.items()}
    probe_keys = [artefact.key for artefact in probes.values()]
    chosen_layers = _chosen("layer", layers, study.layers)
    saes = [
        _sae(experiment, store, probe_keys, arm, seed, layer)
        for layer in chosen_layers
        for arm in _chosen("arm", arms, study.arms)
        for seed in _chosen("seed", seeds, study.seeds)
    ]
    return Plan(
        experiment=experiment,
        model=model,
        store=store,
        probes=probes,
        llm_probing={layer: _llm_probing(experiment, probe_keys, layer) for layer in chosen_layers if probes},
        saes=tuple(saes),
    )


def _chosen(what: str, wanted: Iterable[T] | None, declared: tuple[T, ...]) -> tuple[T, ...]:
    if wanted is None:
        return declared
    chosen = tuple(dict.fromkeys(wanted))
    for value in chosen:
        if value not in declared:
            raise BadInputError(f"{what} {value!r} is not part of the study, which has {list(declared)}")
    return chosen


def _model(experiment: Experiment) -> Artefact | None:
    model = experiment.model
    if isinstance(model, HuggingFaceModel):
        return None
    inputs: dict[str, Any] = {"format": MODEL_FORMAT, "model": model.model_dump()}
    if not isinstance(model, SyntheticModel):
        inputs |= {"context": experiment.store.context, "corpus": _corpus(experiment)}
    return Artefact(kind="models", label=model.name, inputs=inputs)


def _external_model(experiment: Experiment) -> dict[str, Any]:
    model = experiment.model
    assert isinstance(model, HuggingFaceModel)
    folder = Path(model.name)
    if folder.is_dir():
        counted = [(path.name, path) for path in folder.iterdir() if path.suffix in MODEL_FILES]
        return {"content": fingerprint(counted), "dtype": model.dtype}
    return model.model_dump(include={"name", "revision", "dtype"})


def _corpus(experiment: Experiment) -> dict[str, Any]:
    corpus = experiment.corpus
    if isinstance(corpus, PythonCorpus):
        return {"source": "python", "content": python.fingerprint()}
    if isinstance(corpus, FilesCorpus):
        content = files.corpus_fingerprint(corpus)
        return {"source": "files", "content": content, "text_column": corpus.text_column}
    return corpus.model_dump()


def _model_label(experiment: Experiment) -> str:
    return Path(experiment.model.name).name


def _store(experiment: Experiment, model: dict[str, Any]) -> Artefact:
    corpus = experiment.corpus
    corpus_label = Path(corpus.name).name if isinstance(corpus, HuggingFaceCorpus) else corpus.source
    inputs = {
        "format": STORE_FORMAT,
        "model": model,
        "corpus": _corpus(experiment),
        "store": experiment.store.model_dump(),
    }
    label = "-".join(dict.fromkeys((_model_label(experiment), corpus_label)))  # "synthetic" is both, and said once
    return Artefact(kind="stores", label=label, inputs=inputs)


def _probe_store(experiment: Experiment, model: dict[str, Any], name: str, dataset: str) -> Artefact:
    store, probes = experiment.store, experiment.probes
    inputs = {
        "format": PROBES_FORMAT,
        "model": model,
        "dataset": name,
        "content": _probe_content(dataset),
        "probes": probes.model_dump(exclude={"datasets"}),
        "store": store.model_dump(include={"layers", "forward_batch", "dtype", "codec", "shard_rows", "chunk_rows"}),
    }
    return Artefact(kind="probes", label=f"{name}-{_model_label(experiment)}", inputs=inputs)


def _probe_content(dataset: str) -> str | None:
    if is_probe_folder(dataset):
        return files.probe_fingerprint(Path(dataset))
    if dataset in python.TASKS:
        return python.fingerprint()
    if dataset in SAE_BENCH_DATASETS:
        return None  # its loaders pin no revision: the name is all that is known
    known = ", ".join([*SAE_BENCH_DATASETS, *python.TASKS])
    raise BadInputError(
        f"probes.datasets: {dataset!r} is neither a folder with train.parquet and test.parquet nor one of {known}"
    )


def _llm_probing(experiment: Experiment, probe_keys: list[str], layer: int) -> Artefact:
    inputs = {
        "format": EVALUATION_FORMAT,
        "probes": probe_keys,
        "layer": layer,
        "k_values": list(experiment.evaluate.k_values),
        "seed": experiment.probes.seed,
    }
    return Artefact(kind="evaluations", label=f"llm-layer{layer}", inputs=inputs)


def _sae_artefact(
    experiment: Experiment,
    store: Artefact,
    arm: str,
    seed: int,
    layer: int,
    matched_to: Artefact | None = None,
) -> Artefact:
    # The other arm's name in `match_l0` says nothing of its recipe; its key does.
    fields = recipe(arm, experiment.train, experiment.arms).model_dump(exclude={"match_l0"})
    for name, before in (("activation", "relu"), ("penalty", None)):  # fields that did not exist
        if fields[name] == before:
            del fields[name]
    inputs = {"format": SAE_FORMAT, "store": store.key, "layer": layer, "recipe": fields, "seed": seed}
    if matched_to:
        inputs["matched_to"] = matched_to.key
    return Artefact(kind="saes", label=f"{arm}-s{seed}", inputs=inputs)


def _sae(experiment: Experiment, store: Artefact, probe_keys: list[str], arm: str, seed: int, layer: int) -> TrainedSAE:
    config = recipe(arm, experiment.train, experiment.arms)
    reference = _sae(experiment, store, probe_keys, config.match_l0, seed, layer) if config.match_l0 else None
    sae = _sae_artefact(experiment, store, arm, seed, layer, reference.artefact if reference else None)
    # The baseline itself is matched to nothing.
    baseline = _sae_artefact(experiment, store, BASELINE, seed, layer) if BASELINE in experiment.study.arms else None
    evaluation = Artefact(
        kind="evaluations",
        label=f"{arm}-s{seed}",
        inputs={
            "format": EVALUATION_FORMAT,
            "sae": sae.key,
            "baseline": baseline.key if baseline else None,
            "probes": probe_keys,
            "seed": experiment.probes.seed,
            "evaluate": experiment.evaluate.model_dump(),
        },
    )
    return TrainedSAE(
        arm=arm,
        seed=seed,
        layer=layer,
        recipe=config,
        artefact=sae,
        evaluation=evaluation,
        baseline=baseline,
        matched_to=reference,
    )
