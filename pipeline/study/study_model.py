"""Finds and opens the model of a study: its language model up to the deepest layer of the store, or its synthetic model."""

from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError
from pipeline.models.access import check_available
from pipeline.models.language import ResidualStream
from pipeline.models.model_section import HuggingFaceModel, KnownFeatures, SAELensModel
from pipeline.models.saelens_model import SAELensTruth
from pipeline.models.synthetic import FEATURES, GroundTruth, Truth
from pipeline.runtime.devices import best_device
from pipeline.study.plan import Plan


def study_model(plan: Plan, workspace: Workspace) -> tuple[str, str | None]:
    """Where a study's language model is loaded from: a folder, or the name of a repository and its revision.

    Raises MissingArtefactError when the study's own model is not trained yet, BadInputError for a synthetic model, which
    reads no text, and ModelAccessError, which says whether a login or the acceptance of a licence is missing.
    """
    experiment = plan.experiment
    if isinstance(experiment.model, HuggingFaceModel):
        check_available(experiment.model)
        return experiment.model.name, experiment.model.revision
    if isinstance(experiment.model, KnownFeatures):
        raise BadInputError(f"{experiment.name} has a synthetic model, which reads no text")
    assert plan.model is not None
    workspace.require(plan.model, f"dasae extract {experiment.argument}")
    return str(workspace.fetched(plan.model)), None


def open_study_model(plan: Plan, workspace: Workspace) -> ResidualStream:
    """A study's language model, up to the deepest layer of its store.

    Raises what `study_model` does, and BadInputError when the model is not as the experiment declares it.
    """
    config = plan.experiment.model
    name, revision = study_model(plan, workspace)
    device = best_device(plan.experiment.run.device)
    layers = plan.experiment.store.layers
    model = ResidualStream(name, revision=revision, layers=layers, dtype=config.dtype, device=device)
    if (model.d_in, model.depth) != (config.d_in, config.depth):
        raise BadInputError(
            f"model: {config.name} has d_in {model.d_in} and depth {model.depth}, "
            f"the experiment declares d_in {config.d_in} and depth {config.depth}"
        )
    # Otherwise a context that is too long would fail only when the probe texts are read, hours later.
    model.check_context(max(plan.experiment.store.context, plan.experiment.probes.context))
    return model


def open_synthetic_model(plan: Plan, workspace: Workspace) -> Truth:
    """The synthetic model of a study: its true features."""
    assert plan.model is not None
    if isinstance(plan.experiment.model, SAELensModel):
        return SAELensTruth.load(workspace.fetched(plan.model))
    return GroundTruth.load(workspace.verified(plan.model, FEATURES))
