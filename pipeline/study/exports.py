"""Publishes finished SAEs on the Hugging Face Hub, in SAELens' format: one, or all of a study."""

from collections.abc import Callable, Mapping
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory

from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError
from pipeline.models.access import publishing
from pipeline.sae.finished import export_sae, find
from pipeline.study.model_card import model_card, study_card
from pipeline.study.plan import Plan

Tell = Callable[[str], None]


def publish(what: Plan | str, target: str, workspace: Workspace, *, hub: bool, tell: Tell) -> None:
    """Write the SAEs of a study, or one by its name or path, into a folder or a repository of the Hub, with model cards.

    `tell` gets a line for each. Raises what `find`, `export_sae` and `upload` do.
    """
    if isinstance(what, Plan):
        saes, card = places(what, workspace), card_of(what, workspace)
    else:
        found = find(what, workspace)
        saes, card = {found.resolve().name.rpartition("-")[0] if hub else "": found}, None
    if hub:
        upload(saes, target, workspace, card, tell)
        return
    for place, sae in saes.items():
        export_sae(sae, Path(target) / place, model_card(sae, workspace))
        tell(f"export: {sae.name} to {Path(target) / place}")


def places(plan: Plan, workspace: Workspace) -> dict[str, Path]:
    """The finished SAEs of a study that are trained here: folder in the repository, and in the workspace.

    Raises BadInputError when none is finished.
    """
    found = {
        f"layer_{sae.layer}/{sae.artefact.label}": workspace.fetched(sae.artefact)
        for sae in plan.to_train
        if workspace.manifest(sae.artefact)
    }
    if not found:
        raise BadInputError(f"no SAE of {plan.experiment.name} is trained yet; run: dasae train {plan.experiment.argument}")
    return found


def upload(saes: Mapping[str, Path], repository: str, workspace: Workspace, card: str | None, tell: Tell) -> None:
    """Upload SAEs into folders of a repository, which is created, private, if it does not exist; at last `card` at its root.

    What is there already is not sent again, so the same call goes on after an interruption. Raises BadInputError for what is
    no name of a repository, and ModelAccessError, which says why, where the Hub refuses.
    """
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise BadInputError(f"{repository!r} is no repository of the Hugging Face Hub; name one as OWNER/NAME")
    with publishing(repository) as hub, TemporaryDirectory(dir=workspace.local, prefix=".export-") as temporary:
        hub.create_repo(repository, private=True, exist_ok=True)
        for place, sae in saes.items():
            folder = Path(temporary) / place.replace("/", "-")
            export_sae(sae, folder, model_card(sae, workspace))
            hub.upload_folder(
                repo_id=repository,
                folder_path=folder,
                path_in_repo=place,
                commit_message=f"Add {place}",
                run_as_future=False,
            )
            rmtree(folder)
            tell(f"export: {place} to {repository}")
        if card is not None:
            hub.upload_file(
                repo_id=repository,
                path_or_fileobj=card.encode(),
                path_in_repo="README.md",
                commit_message="Describe the SAEs",
            )


def card_of(plan: Plan, workspace: Workspace) -> str:
    """The README.md of a repository with a study's SAEs."""
    experiment = plan.experiment
    return study_card(experiment.name, experiment.description, experiment.model.name, places(plan, workspace), workspace)
