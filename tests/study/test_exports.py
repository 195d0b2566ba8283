"""Publishing on the Hub: the real client against a server that takes commits as the Hub does."""

import base64
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from local_server import Quiet, serving
from small_study import Study
from typer.testing import CliRunner

from pipeline.artefacts.workspace import Workspace
from pipeline.cli import app
from pipeline.errors import BadInputError, ModelAccessError
from pipeline.runtime.compatibility import importing_sae_bench
from pipeline.sae.finished import load_sae
from pipeline.study.exports import places
from pipeline.study.plan import make_plan

REPOSITORY = "somebody/saes"


@dataclass
class Hub:
    endpoint: str = ""
    status: int = 200
    created: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    files: dict[str, bytes] = field(default_factory=dict[str, bytes])
    tokens: set[str | None] = field(default_factory=set[str | None])

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return {"url": f"{self.endpoint}/{REPOSITORY}", "name": REPOSITORY}
        if path.endswith("/preupload/main"):
            files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return {"files": [file | {"shouldIgnore": False} for file in files]}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            return {"commitUrl": f"{self.endpoint}/{REPOSITORY}/commit/{'0' * 40}", "commitOid": "0" * 40}
        return {}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub on this machine, at which this process is logged in."""
    found = Hub()

    class Answer(Quiet):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found.tokens.add(self.headers.get("Authorization"))
            content = json.dumps(found.answer(self.path.partition("?")[0], body)).encode()
            self.send_response(found.status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody_may_see_this")
    with serving(Answer) as found.endpoint:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", found.endpoint)
        monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", found.endpoint, raising=False)
        yield found


def exported(study: Study, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["export", *arguments, "--workspace", str(study.workspace.root)])


def test_one_sae_is_uploaded_with_its_card_and_loads(study: Study, hub: Hub, tmp_path: Path) -> None:
    done = exported(study, "full-s0", REPOSITORY, "--to", "hub")
    assert (done.exit_code, done.output) == (0, f"export: full-s0 to {REPOSITORY}\n")
    assert "private" in json.dumps(hub.created[0]), "a new repository is private"
    assert set(hub.files) == {f"full-s0/{name}" for name in ("README.md", "cfg.json", "sae_weights.safetensors")}
    assert "hf_nobody" not in "".join(content.decode("latin-1") for content in hub.files.values())
    for name, content in hub.files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with importing_sae_bench():
        import sae_lens
    theirs: Any = sae_lens.SAE.load_from_disk(str(tmp_path / "full-s0"))
    x_BD = torch.randn(5, study.experiment.model.d_in)
    expected_BF = load_sae("full-s0", study.workspace).encode(x_BD)
    torch.testing.assert_close(theirs.encode(x_BD).detach(), expected_BF, rtol=1e-5, atol=1e-5)


def test_a_study_is_uploaded_whole_and_described(study: Study, hub: Hub) -> None:
    done = exported(study, study.experiment.argument, REPOSITORY, "--to", "hub")
    assert done.exit_code == 0
    folders = {f"layer_2/{arm}-s0" for arm in ("baseline", "full", "magnitude")}
    assert {Path(name).parent.as_posix() for name in hub.files} == folders | {"."}
    card = hub.files["README.md"].decode()
    assert card.startswith("---\nlibrary_name: sae_lens\n")
    for folder in folders:
        (line,) = [line for line in card.splitlines() if line.startswith(f"| {folder} |")]
        assert len([float(number) for number in line.split("|")[2:4]]) == 2


def test_a_study_is_exported_into_folders(study: Study, tmp_path: Path) -> None:
    assert exported(study, study.experiment.argument, str(tmp_path / "all")).exit_code == 0
    found = {path.parent.relative_to(tmp_path / "all").as_posix() for path in (tmp_path / "all").rglob("cfg.json")}
    assert found == {f"layer_2/{arm}-s0" for arm in ("baseline", "full", "magnitude")}


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (401, "somebody/saes cannot be written: the Hugging Face token is not valid: run `hf auth login`, or set HF_TOKEN"),
        (403, "somebody/saes cannot be written: this account may not write there"),
        (500, "somebody/saes cannot be written: the Hub answered 500; try again later"),
    ],
)
def test_why_the_hub_refuses(study: Study, hub: Hub, status: int, said: str) -> None:
    hub.status = status
    done = exported(study, "full-s0", REPOSITORY, "--to", "hub")
    assert isinstance(done.exception, ModelAccessError)
    assert str(done.exception) == said


def test_no_login_no_network_and_no_name(study: Study, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(repository: str = REPOSITORY) -> str:
        done = exported(study, "full-s0", repository, "--to", "hub")
        assert isinstance(done.exception, BadInputError)
        return str(done.exception)

    assert said("saes") == "'saes' is no repository of the Hugging Face Hub; name one as OWNER/NAME"
    assert said("some body/saes").endswith("is no name that the Hugging Face Hub takes; name another one")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert said() == f"{REPOSITORY} cannot be written: HF_HUB_OFFLINE is set; unset it"
    assert exported(study, "full-s0").exit_code == 2, "a repository is always named"
    assert not hub.files


def test_an_untrained_study_has_nothing_to_upload(study: Study, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no SAE of small is trained yet; run: dasae train"):
        places(make_plan(study.experiment), Workspace(tmp_path / "empty"))
