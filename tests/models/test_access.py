"""What a user is told when a gated model cannot be had: the real client against a server that answers as the Hub does."""

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from local_server import Quiet, serving

from pipeline.runtime.compatibility import quiet_hub

ASK = """
from pipeline.errors import ModelAccessError
from pipeline.models.access import check_access
try:
    check_access("google/gemma-2-2b", "main")
except ModelAccessError as error:
    print(error)
"""


@contextmanager
def hub(status: int, code: str) -> Iterator[str]:
    class Answer(Quiet):
        def do_HEAD(self) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", "no")
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_GET = do_HEAD

    with serving(Answer) as address:
        yield address


def ask(home: Path, **environment: str) -> str:
    """What `check_access` says in a fresh process with a cache and a login of its own."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        capture_output=True,
        text=True,
        check=True,
        env=clean | {"HF_HOME": str(home)} | environment,
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("status", "code", "token", "message"),
    [
        (401, "GatedRepo", None, "not logged in to Hugging Face, and google/gemma-2-2b is gated: run `hf auth login`"),
        (401, "GatedRepo", "hf_abc", "the Hugging Face token is not valid, and google/gemma-2-2b is gated"),
        (403, "GatedRepo", "hf_abc", "logged in, but this account has not accepted the licence of google/gemma-2-2b"),
        (404, "RepoNotFound", "hf_abc", "model 'google/gemma-2-2b' is neither a folder nor a repository"),
        (404, "RevisionNotFound", "hf_abc", "model google/gemma-2-2b has no revision 'main'"),
    ],
)
def test_the_reason_is_told_apart(tmp_path: Path, status: int, code: str, token: str | None, message: str) -> None:
    with hub(status, code) as endpoint:
        said = ask(tmp_path, HF_ENDPOINT=endpoint, **({"HF_TOKEN": token} if token else {}))
    assert message in said
    assert "\n" not in said
    assert "hf_abc" not in said


def test_no_network_is_told_apart_too(tmp_path: Path) -> None:
    said = ask(tmp_path, HF_HUB_OFFLINE="1")
    assert said == "model google/gemma-2-2b is not in the local cache, and the Hugging Face Hub cannot be reached"


def test_the_clients_retries_are_not_told() -> None:
    client = logging.getLogger("huggingface_hub.utils._http")
    with quiet_hub():
        assert not client.isEnabledFor(logging.WARNING)
    assert client.isEnabledFor(logging.WARNING)
