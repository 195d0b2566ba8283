"""Finds out why a model cannot be loaded, or a file of the Hub cannot be had: an incomplete folder, no login, no licence."""

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline.errors import ModelAccessError, in_one_line
from pipeline.models.model_section import HuggingFaceModel
from pipeline.runtime.compatibility import quiet_hub

LOGIN = "run `hf auth login`, or set HF_TOKEN"


def check_available(config: HuggingFaceModel) -> None:
    """Raise ModelAccessError, which says why, for a model that cannot be loaded."""
    if Path(config.name).is_dir():
        check_folder(Path(config.name))
    else:
        check_access(config.name, config.revision)


def check_folder(folder: Path) -> None:
    """Raise ModelAccessError for a folder without configuration or weights."""
    if not (folder / "config.json").is_file():
        raise ModelAccessError(f"{folder} holds no model: it has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise ModelAccessError(
            f"{folder} has no .safetensors weights, and pickled ones are not loaded because they can run code: "
            "load the model where you trust it and call its save_pretrained"
        )


def check_access(name: str, revision: str | None) -> None:
    """Fetch config.json of a model's repository; raise ModelAccessError, which says why, if that is not possible."""
    fetch(name, revision, "config.json", "model")


def fetch(name: str, revision: str | None, file: str, what: str) -> Path:
    """A file of a repository, from the cache or the Hub. Raises ModelAccessError, which says why there is none.

    `what` is in the repository, in a word.
    """
    import huggingface_hub

    with reaching(name, revision, what, file):
        return Path(huggingface_hub.hf_hub_download(name, file, revision=revision))


@contextmanager
def publishing(repository: str) -> Generator[Any]:
    """The Hub's client, to upload with. Raises ModelAccessError, which says why, for what it raises about a repository."""
    import httpx
    import huggingface_hub
    from huggingface_hub import errors as hub
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        with quiet_hub():
            yield huggingface_hub.HfApi()
    except hub.LocalTokenNotFoundError:
        raise ModelAccessError(f"not logged in to Hugging Face, so {repository} cannot be written: {LOGIN}") from None
    except hub.OfflineModeIsEnabled:
        raise ModelAccessError(f"{repository} cannot be written: HF_HUB_OFFLINE is set; unset it") from None
    except hub.HFValidationError:
        raise ModelAccessError(f"{repository!r} is no name that the Hugging Face Hub takes; name another one") from None
    except hub.HfHubHTTPError as error:
        status = error.response.status_code
        who = f"the Hugging Face token is not valid: {LOGIN}" if status == 401 else "this account may not write there"
        said = who if status in (401, 403, 404) else f"the Hub answered {status}; try again later"
        raise ModelAccessError(f"{repository} cannot be written: {said}") from None
    except httpx.TransportError as error:
        raise ModelAccessError(f"{repository} cannot be written: the Hub cannot be reached ({in_one_line(error)})") from None
    finally:
        if not before:
            enable_progress_bars()


@contextmanager
def reaching(name: str, revision: str | None, what: str, file: str = "such file") -> Generator[None]:
    """Raise ModelAccessError, which says why, for what the Hub's client raises about a repository."""
    import huggingface_hub
    from huggingface_hub import errors as hub

    try:
        with quiet_hub():
            yield
    except hub.GatedRepoError as error:
        if error.response.status_code == 401:  # no token or an unknown one; 403 is a known account
            who = "the Hugging Face token is not valid" if huggingface_hub.get_token() else "not logged in to Hugging Face"
            problem = f"{who}, and {name} is gated: {LOGIN}"
        else:
            problem = (
                f"logged in, but this account has not accepted the licence of {name}: accept it on its page "
                f"(huggingface.co/{name}) and run the same command again"
            )
        raise ModelAccessError(problem) from None
    except hub.RevisionNotFoundError:
        raise ModelAccessError(f"{what} {name} has no revision {revision!r}") from None
    except hub.RepositoryNotFoundError:
        raise ModelAccessError(f"{what} {name!r} is neither a folder nor a repository that this account can see") from None
    except hub.HFValidationError:
        raise ModelAccessError(f"{what} {name!r} is neither a folder nor a repository name") from None
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        raise ModelAccessError(
            f"{what} {name} is not in the local cache, and the Hugging Face Hub cannot be reached"
        ) from None
    except hub.EntryNotFoundError:
        problem = f"{what} {name} has no {file}, so it cannot be loaded: name another one"
        raise ModelAccessError(problem) from None
