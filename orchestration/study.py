"""Runs a study as Prefect tasks: cuts each stage into pieces that can fail, be retried and run in parallel."""

from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from prefect import get_run_logger
from prefect.events import emit_event
from prefect.runtime import flow_run
from prefect.tasks import Task

from orchestration.artifacts import ProgressPage, show_report, show_results
from orchestration.engine import Engine, stop_on_request
from orchestration.states import reason, stage_task, value_or_error
from pipeline.artefacts.glance import Glance
from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError, MissingArtefactError
from pipeline.runtime.progress import watched_by
from pipeline.study.cutting import pieces
from pipeline.study.plan import Plan
from pipeline.study.planned import PlannedSAE
from pipeline.study.reports import is_current

if TYPE_CHECKING:
    from pipeline.extract.extraction import Extraction

ACTIVATIONS_READY = "activations.ready"
"""Event: an activation store was filled. `prefect.yaml` starts training on it."""

_OPEN: "dict[str, Extraction]" = {}
"""What this process extracts, if it does, by what it makes. Parts are small, and opening the model takes long; the other
stages close it, because they need the memory."""
Failures = dict[str, str]
"""The reason of each failure, by the name of what failed."""


@contextmanager
def _on_the_page(plan: Plan, stop: str | None, part: str = "") -> Generator[None]:
    with watched_by(ProgressPage(plan.experiment.name, part)), stop_on_request(stop):
        yield


@stage_task("prepare {plan.experiment.name}")
def prepare(plan: Plan, workspace: Workspace, stop: str | None = None) -> tuple[list[str], dict[str, list[int]]]:
    """Make the study's model and lay out its stores; returns the paths made, and the missing shards of each store."""
    with _on_the_page(plan, stop):
        extraction = _kept_open(plan, workspace)
        return _paths(extraction.make_model()), extraction.prepare()


@stage_task("extract {plan.experiment.name}, part {part}")
def write_shards(
    plan: Plan, workspace: Workspace, work: dict[str, list[int]], part: int, stop: str | None = None
) -> dict[str, float]:
    """Make some shards of some stores; returns the seconds spent on each store."""
    with _on_the_page(plan, stop, f"part {part}"):
        extraction = _kept_open(plan, workspace)
        extraction.seconds.clear()
        extraction.write(work)
        return dict(extraction.seconds)


def _kept_open(plan: Plan, workspace: Workspace) -> "Extraction":
    """The extraction of these stores, with the model that this process opened for the part before."""
    from pipeline.extract.extraction import Extraction

    name = " ".join([str(workspace.root), *(artefact.path for artefact in plan.extracted)])
    if name not in _OPEN:
        _OPEN.clear()
        _OPEN[name] = Extraction(plan, workspace)
    return _OPEN[name]


@stage_task("publish {plan.experiment.name}")
def publish_stores(plan: Plan, workspace: Workspace, seconds: dict[str, float], stop: str | None = None) -> list[str]:
    """Publish the stores that have all their shards; returns their paths."""
    from pipeline.extract.extraction import Extraction

    _OPEN.clear()
    with _on_the_page(plan, stop):
        return _paths(Extraction(plan, workspace).finish(list(seconds), seconds))


@stage_task("train layer {plan.saes[0].layer}: {plan.arms_in_words}")
def train_cohort(plan: Plan, workspace: Workspace, stop: str | None = None) -> tuple[list[str], Failures]:
    """Train SAEs that share their batches, or bring in SAEs from outside; returns the paths made, and the failures."""
    from pipeline.extract.extraction import row_maker
    from pipeline.train.training import train

    _OPEN.clear()
    with _on_the_page(plan, stop):
        trained = train(plan, workspace, row_maker=row_maker)
        return [sae.artefact.path for sae in trained.made], trained.failed


@stage_task("evaluate layer {plan.saes[0].layer}: {plan.arms_in_words}")
def evaluate_saes(plan: Plan, workspace: Workspace, stop: str | None = None) -> tuple[list[str], Failures]:
    """Evaluate SAEs of one layer; returns the paths made, and the failures."""
    from pipeline.evaluate.evaluation import evaluate

    _OPEN.clear()
    with _on_the_page(plan, stop):
        evaluated = evaluate(plan, workspace)
        for sae, why in evaluated.degenerate.items():
            get_run_logger().warning("%s is degenerate: %s", sae, why)
        return evaluated.paths, evaluated.failed


@stage_task("report {plan.experiment.name}")
def write_page(plan: Plan, workspace: Workspace) -> None:
    """Write the report of what is evaluated, and link it on the page of the flow run."""
    from pipeline.report.collect import collect
    from pipeline.report.page import write_report

    results, place = collect(plan, workspace), workspace.report(plan.experiment.name)
    write_report(results, place)
    show_results(results)
    show_report(plan.experiment.name, place)


@dataclass(kw_only=True)
class Study:
    """One flow run: the part of the study that it makes, its workspace, where its tasks run, and their results so far."""

    plan: Plan
    workspace: Workspace
    engine: Engine
    made: list[str] = field(default_factory=list[str])
    failed: Failures = field(default_factory=dict[str, str])

    def discard(self, artefacts: Sequence[Artefact]) -> None:
        """Remove artefacts so that they are made again. A retry of the flow run removes nothing: it goes on."""
        if flow_run.run_count in (None, 0, 1):
            for artefact in artefacts:
                self.workspace.discard(artefact)

    @property
    def nothing_trained(self) -> bool:
        """True when no SAE of the plan exists, so that there is nothing to evaluate."""
        with Glance.at(self.workspace) as seen:
            return not any(seen.manifest(artefact) for artefact in self.plan.trained)

    def _done(self, artefacts: Sequence[Artefact]) -> bool:
        """Whether all of these exist."""
        with Glance.at(self.workspace) as seen:
            return all(seen.manifest(artefact) for artefact in artefacts)

    def extract(self) -> None:
        """Fill every store of the study. Raises the error of a failed task: no other stage can run without the stores."""
        if self._done(self.plan.extracted):
            return  # before heavy imports
        from pipeline.extract.extraction import shares

        ((made, work),) = self._values(prepare, [{}])
        parts = shares(work, self.engine.workers) if self.engine.shared else [work]
        seconds = Counter(dict.fromkeys(work, 0.0))
        for spent in self._values(write_shards, [{"work": part, "part": number} for number, part in enumerate(parts, 1)]):
            seconds.update(spent)
        (published,) = self._values(publish_stores, [{"seconds": dict(seconds)}])
        self.made += [*made, *published]

    def announce(self) -> None:
        """Emit ACTIVATIONS_READY if this run filled the activation store."""
        store, experiment = self.plan.store, self.plan.experiment
        if store.path in self.made:
            emit_event(
                ACTIVATIONS_READY,
                resource={
                    "prefect.resource.id": f"dasae.store.{store.key}",
                    "prefect.resource.name": store.name,
                    "dasae.experiment": experiment.name,
                },
                payload={"experiment": experiment.argument, "workspace": str(self.workspace.root)},
            )

    def train(self) -> None:
        """Train or bring in every SAE that is missing. A failure is recorded; the other SAEs go on."""
        if self._done(self.plan.trained):
            return
        from pipeline.study.gpu_hours import training_seconds
        from pipeline.train.training import groups

        workers, d_in = self.engine.workers, self.plan.experiment.model.d_in
        self._each(train_cohort, pieces([self.plan.from_outside], workers, seconds=len))
        # An SAE that is matched to another needs that one first.
        for matched in (False, True):
            part = replace(self.plan, saes=tuple(sae for sae in self.plan.to_train if bool(sae.matched_to) == matched))
            # How many of a piece fit together, the worker finds out: it knows its device.
            self._each(
                train_cohort,
                pieces(groups(part, self.workspace), workers, seconds=partial(training_seconds, d_in=d_in)),
            )

    def evaluate(self) -> None:
        """Evaluate every SAE that exists and is not evaluated. A failure is recorded; the other SAEs go on."""
        if self._done(self.plan.evaluated):
            return
        from pipeline.evaluate.evaluation import unmeasured, unprobed
        from pipeline.study.gpu_hours import Evaluating

        missing = unmeasured(self.plan, self.workspace)
        for layer in set(unprobed(self.plan, self.workspace)) - {sae.layer for sae in missing}:
            missing.append(next(sae for sae in self.plan.saes if sae.layer == layer))  # its task probes the model
        # By seed, so that those of a piece are measured beside few baselines.
        missing.sort(key=lambda sae: (sae.seed, sae.sparsity or 0.0))
        layers = [[sae for sae in missing if sae.layer == layer] for layer in dict.fromkeys(sae.layer for sae in missing)]
        self._each(evaluate_saes, pieces(layers, self.engine.workers, seconds=Evaluating.of(self.plan).seconds))

    def report(self) -> None:
        """Write the report of all that is evaluated, unless it is up to date."""
        with Glance.at(self.workspace) as seen:
            current = is_current(self.plan, seen)
        if current:
            if self.workspace.remote:  # the link of the last run works for some days only
                show_report(self.plan.experiment.name, self.workspace.report(self.plan.experiment.name))
            return
        value = value_or_error(write_page(self.plan, self.workspace, return_state=True))
        if isinstance(value, Exception):
            self.failed["report"] = reason(value)

    def _each(self, task: Task[..., tuple[list[str], Failures]], cut: Sequence[Sequence[PlannedSAE]]) -> None:
        plans = [replace(self.plan, saes=tuple(piece)) for piece in cut]
        for piece, value in zip(cut, self._outcomes(task, [{"plan": plan} for plan in plans]), strict=True):
            if isinstance(value, BadInputError | MissingArtefactError):
                raise value  # no other piece can succeed either
            if isinstance(value, Exception):
                self.failed |= dict.fromkeys(map(str, piece), reason(value))
            else:
                self.made += value[0]
                self.failed |= value[1]

    def _values(self, task: Task[..., Any], calls: Sequence[Mapping[str, Any]]) -> list[Any]:
        values = self._outcomes(task, calls)
        for value in values:
            if isinstance(value, Exception):
                raise value
        return values

    def _outcomes(self, task: Task[..., Any], calls: Sequence[Mapping[str, Any]]) -> list[Any]:
        shared = {"plan": self.plan, "workspace": self.workspace}
        return [value_or_error(state) for state in self.engine.run(task, [shared | dict(call) for call in calls])]


def _paths(artefacts: Sequence[Artefact]) -> list[str]:
    return [artefact.path for artefact in artefacts]
