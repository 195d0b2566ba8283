"""Collects the results of a study from the artefacts in the workspace."""

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import pipeline
from pipeline.artefacts.manifest import Artefact, Manifest
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import CorruptArtefactError, MissingArtefactError, PipelineError, in_one_line
from pipeline.models.model_section import HuggingFaceModel, KnownFeatures, TinyModel
from pipeline.report.differences import differences
from pipeline.report.latents import ExamplesOf, SeparatedOf
from pipeline.report.results import Arm, Cost, Curve, Model, Results, Row, StoreFacts, Task, Training, levels_of, middle
from pipeline.store.batches import split_shards
from pipeline.store.norms import massive_rows
from pipeline.store.reader import ActivationStore
from pipeline.study.arms import arms_of
from pipeline.study.evaluations import EVALUATIONS
from pipeline.study.plan import TRAINING_LOG, Plan
from pipeline.study.planned import PlannedSAE, TrainedSAE
from pipeline.study.recipe import NO_PENALTY
from pipeline.study.reports import made_of
from pipeline.study.stage_code import imported
from pipeline.texts.text_sections import CorpusConfig, FilesCorpus, MixedCorpus

TRAINING_FACTS = ("steps", "tokens", "resets", "seconds")
"""Fields of a row that come from the manifest of an SAE trained here."""
CURVES = ("step", "fvu", "l0", "dead_fraction")
"""Fields of a curve that come from the training log."""
EXAMPLES_OF = ("full", "baseline")
"""Arms whose latents the report shows; the first arm's in a study with neither."""

BY_OTHERS = "trained by others"
"""Takes the place of the penalty where no recipe is known."""
GEMMA = "google/gemma-2-2b"
REPORTED_LLM_PROBING = {
    "1": 0.684275, "2": 0.7260625, "5": 0.774625, "10": 0.82099375, "20": 0.8589375, "50": 0.90028125, "all": 0.939325
}  # fmt: skip
"""Sparse probing of GEMMA's own activations in the log that the method comes from, which names no layer."""


def collect(plan: Plan, workspace: Workspace) -> Results:
    """Everything the report shows: one row per evaluated SAE, and how they came about.

    Raises MissingArtefactError while nothing of the study is evaluated, and CorruptArtefactError for an artefact that is not
    as this program writes it.
    """
    experiment = plan.experiment
    seen = _Seen(workspace)
    evaluated = [sae for sae in plan.saes if seen.manifest(sae.evaluation)]
    for sae in evaluated:
        if seen.manifest(sae.artefact) is None:  # such as an SAE matched to one that was trained again
            raise MissingArtefactError(f"{sae} is out of date or removed; run: dasae ablate {experiment.argument}")
    if not evaluated:
        raise MissingArtefactError(f"nothing of {experiment.name} is evaluated yet; run: dasae ablate {experiment.argument}")
    rows = [_row(sae, seen) for sae in evaluated]
    with _understood(f"the model, the stores or the SAEs of {experiment.name}"):
        results = _results(plan, workspace, seen, evaluated, rows)
    return results.model_copy(update={"differences": tuple(differences(results))})


def _results(plan: Plan, workspace: Workspace, seen: "_Seen", evaluated: list[PlannedSAE], rows: list[Row]) -> Results:
    experiment = plan.experiment
    return Results(
        experiment=experiment.name,
        description=experiment.description,
        generated=datetime.now(UTC).isoformat(timespec="seconds"),
        version=pipeline.__version__,
        made_of=made_of(plan, workspace),
        is_demo=isinstance(experiment.model, TinyModel),
        is_synthetic=isinstance(experiment.model, KnownFeatures),
        model=_model(plan, workspace),
        reported_llm_probing=REPORTED_LLM_PROBING if experiment.model.name == GEMMA else None,
        store=_store(plan, workspace),
        tasks=tuple(_task(plan, name, artefact, workspace) for name, artefact in plan.probes.items()),
        training=_training(plan, workspace),
        arms=_arms(plan),
        k_values=experiment.evaluate.k_values,
        worth=experiment.worth,
        rows=tuple(rows),
        curves=tuple(_curve(sae, seen) for sae in evaluated if isinstance(sae, TrainedSAE)),
        missing=tuple(str(sae) for sae in plan.saes if sae not in evaluated),
        examples=tuple(_examples(rows)),
        separated=tuple(_separated(rows)),
        cost=_cost(plan, evaluated, seen),
    )


@contextmanager
def _understood(what: str) -> Generator[None]:
    """Raise CorruptArtefactError for content that is whole and cannot be understood: of another program, or forged."""
    try:
        yield
    except PipelineError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = in_one_line(error)
        raise CorruptArtefactError(f"{what} cannot be understood ({reason}); remove it and run its stage again") from None


def _store(plan: Plan, workspace: Workspace) -> StoreFacts:
    experiment = plan.experiment
    facts = workspace.require(plan.store, f"dasae extract {experiment.argument}").facts
    return StoreFacts(
        key=plan.store.key,
        rows=facts["rows"],
        bytes=facts["bytes"],
        layers=experiment.store.layers,
        context=experiment.store.context,
        d_in=facts["d_in"],
        seconds=facts["seconds"],
        corpus=_corpus_name(experiment.corpus),
        remarks=(*massive_rows(facts), *_streamed(facts)),
    )


def _streamed(facts: Mapping[str, Any]) -> Iterator[str]:
    if streamed := facts.get("streamed"):
        yield f"{streamed:,} more rows to train on were made while training and are not kept"


def _corpus_name(corpus: CorpusConfig) -> str:
    if isinstance(corpus, MixedCorpus):
        return " and ".join(f"{part.weight:g} x {_corpus_name(part)}" for part in corpus.parts)
    return ", ".join(corpus.paths) if isinstance(corpus, FilesCorpus) else getattr(corpus, "name", corpus.source)


def _model(plan: Plan, workspace: Workspace) -> Model:
    model = plan.experiment.model
    if isinstance(model, HuggingFaceModel):
        facts: dict[str, Any] = {"revision": model.revision or "a folder", "depth": model.depth, "dtype": model.dtype}
    else:
        assert plan.model is not None
        facts = workspace.require(plan.model, f"dasae extract {plan.experiment.argument}").facts
    return Model(name=model.name, facts=facts)


def _task(plan: Plan, name: str, artefact: Artefact, workspace: Workspace) -> Task:
    probes = plan.experiment.probes
    classes = ActivationStore(workspace.storage(artefact)).layout.classes
    return Task(name=name, classes=tuple(classes), train_size=probes.train_size, test_size=probes.test_size)


def _training(plan: Plan, workspace: Workspace) -> Training:
    recipe, store = plan.experiment.train, ActivationStore(workspace.storage(plan.store))
    _, heldout = split_shards(store, recipe.heldout_shards, recipe.heldout_within)
    return Training(**recipe.model_dump(), heldout_rows=store.rows_of(heldout))


def _arms(plan: Plan) -> tuple[Arm, ...]:
    """The arms in the order of the plan, and the names of SAEs that others trained."""
    known = arms_of(plan.experiment.arms)
    trained = {sae.arm for sae in plan.to_train}
    matched = {sae.arm for sae in plan.to_train if sae.matched_to}

    def described(name: str) -> Arm:
        if name not in trained:
            return Arm(arm=name, run=None, question=None, base=None)
        arm = known[name]
        return Arm(
            arm=name,
            run=arm.run,
            question=arm.question,
            base=None if name == "full" else arm.against,
            matched=name in matched,
        )

    return tuple(described(name) for name in dict.fromkeys(sae.arm for sae in plan.saes))


def _row(sae: PlannedSAE, seen: "_Seen") -> Row:
    evaluated = seen.required(sae.evaluation)
    fields: dict[str, Any] = {"arm": sae.arm, "seed": sae.seed, "layer": sae.layer, "sae": sae.artefact.key}
    fields["sparsity"] = sae.sparsity
    with _understood(str(seen.workspace.storage(sae.artefact))):
        facts = seen.required(sae.artefact).facts
        if isinstance(sae, TrainedSAE):
            fields |= {name: facts[name] for name in TRAINING_FACTS}
            fields |= {"backbone": sae.recipe.backbone, "penalty": sae.recipe.penalty_kind}
        elif "architecture" in facts:
            fields |= {"backbone": facts["architecture"], "penalty": BY_OTHERS}
    with _understood(str(seen.workspace.storage(sae.evaluation))):
        fields["degenerate"] = evaluated.facts["degenerate"]
        for name, evaluation in EVALUATIONS.items() if fields["degenerate"] is None else ():
            artefact = sae.evaluation if evaluation.apart is None else sae.apart.get(name)
            manifest = seen.manifest(artefact) if artefact else None
            if artefact and manifest and evaluation.file in manifest.files:
                fields |= imported(evaluation.show)(json.loads(seen.text(artefact, evaluation.file)))
        return Row.model_validate(fields)


def _examples(rows: list[Row]) -> list[ExamplesOf]:
    """Latents of some SAEs: per layer, of the first seed of each arm in EXAMPLES_OF that has any."""
    first: dict[tuple[int, str], Row] = {}
    shown = (None, middle(levels_of(rows)))
    for row in rows:
        if row.examples and row.sparsity in shown:
            first.setdefault((row.layer, row.arm), row)
    chosen: list[Row] = []
    for layer in dict.fromkeys(layer for layer, _ in first):
        arms = {arm: row for (at, arm), row in first.items() if at == layer}
        chosen += [arms[arm] for arm in EXAMPLES_OF if arm in arms] or list(arms.values())[:1]
    return [ExamplesOf(arm=row.arm, seed=row.seed, layer=row.layer, **dict(row.examples or ())) for row in chosen]


def _separated(rows: list[Row]) -> list[SeparatedOf]:
    """What became of the control's pairs in every SAE; pairs of one an arm and layer, its first seed at the middle L0."""
    level, found = middle(levels_of(rows)), list[SeparatedOf]()
    shown: set[tuple[int, str]] = set()
    for row in rows:
        if row.separated:
            named = {name: getattr(row, name) for name in ("arm", "seed", "layer", "sparsity")}
            one = SeparatedOf(**dict(row.separated) | named, placebo=row.penalty == NO_PENALTY)
            is_shown = row.sparsity == level and (row.layer, row.arm) not in shown
            found.append(one if is_shown else one.model_copy(update={"shown": ()}))
            shown |= {(row.layer, row.arm)} if is_shown else set()
    return found


def _curve(sae: TrainedSAE, seen: "_Seen") -> Curve:
    records = [json.loads(line) for line in seen.text(sae.artefact, TRAINING_LOG).splitlines()]
    curves: dict[str, Any] = {name: tuple(record[name] for record in records) for name in CURVES}
    return Curve(arm=sae.arm, seed=sae.seed, layer=sae.layer, sparsity=sae.sparsity, **curves)


def _cost(plan: Plan, evaluated: list[PlannedSAE], seen: "_Seen") -> Cost:
    def seconds(artefacts: list[Artefact]) -> float:
        manifests = [seen.manifest(artefact) for artefact in artefacts]
        return round(sum(manifest.facts["seconds"] for manifest in manifests if manifest), 1)

    stores = [plan.store, *plan.probes.values()]
    return Cost(
        model_seconds=seconds([plan.model] if plan.model else []),
        extract_seconds=seconds(stores),
        train_seconds=seconds([sae.artefact for sae in evaluated if isinstance(sae, TrainedSAE)]),
        evaluate_seconds=seconds([made for sae in evaluated for made in (sae.evaluation, *sae.apart.values())]),
        store_bytes=sum(ActivationStore(seen.workspace.storage(artefact)).bytes for artefact in stores),
    )


class _Seen:
    """Reads artefacts of a workspace; each manifest once."""

    def __init__(self, workspace: Workspace):
        self.workspace = workspace
        self.manifests: dict[str, Manifest | None] = {}

    def manifest(self, artefact: Artefact) -> Manifest | None:
        """Its manifest; None while it is not made."""
        if artefact.path not in self.manifests:
            self.manifests[artefact.path] = self.workspace.manifest(artefact)
        return self.manifests[artefact.path]

    def required(self, artefact: Artefact) -> Manifest:
        """The manifest of an artefact that must be there, because something was made from it."""
        manifest = self.manifest(artefact)
        if manifest is None:
            raise MissingArtefactError(f"{self.workspace.storage(artefact)} does not exist; run its stage again")
        return manifest

    def text(self, artefact: Artefact, name: str) -> str:
        """One of its files, verified."""
        return self.workspace.verified(artefact, name, self.manifest(artefact)).read_text(encoding="utf-8")
