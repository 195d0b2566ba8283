"""SAEs that others trained, declared in [references]: planned, brought in, evaluated and shown; and what is refused."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from small_study import SMALL, Study

from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError
from pipeline.evaluate.evaluation import evaluate
from pipeline.report.collect import collect
from pipeline.report.page import write_report
from pipeline.runtime.compatibility import importing_sae_bench
from pipeline.sae.finished import export_sae, open_sae
from pipeline.study.experiment import Experiment
from pipeline.study.origins import bring
from pipeline.study.plan import Plan, make_plan

DOCS = Path(__file__).parents[2] / "docs"
THEIRS = '\n[references.theirs]\nlayer = 2\npath = "{}"\n'


COMMIT = "0123456789abcdef" * 2 + "01234567"
HUB = f"""
[references.theirs]
layer = 2
repository = "org/saes"
revision = "{COMMIT}"
folder = "layer2/wide"
"""


RELEASE = f"""
[references.theirs]
layer = 2
release = "gemma-2-2b-res-matryoshka-dc"
sae_id = "blocks.2.hook_resid_post"
revision = "{COMMIT}"
"""


def planned(small_toml: Path, folder: Path, text: str = THEIRS) -> Plan:
    small_toml.write_text(SMALL + text.format(folder))
    return make_plan(Experiment.load(str(small_toml)))


def jumprelu(folder: Path, d_in: int, **metadata: str) -> None:
    """A random SAE of SAELens."""
    with importing_sae_bench():
        import sae_lens
        from sae_lens.saes.sae import SAEMetadata
    torch.manual_seed(0)
    config = sae_lens.JumpReLUSAEConfig(d_in=d_in, d_sae=40, metadata=SAEMetadata(**metadata))
    sae = sae_lens.JumpReLUSAE(config)
    sae.threshold.data.fill_(0.5)
    sae.save_model(str(folder))


def test_a_reference_is_evaluated_and_shown_beside_the_arms(study: Study, small_toml: Path, tmp_path: Path) -> None:
    jumprelu(tmp_path / "sae", study.experiment.model.d_in)
    plan = planned(small_toml, tmp_path / "sae")
    (theirs,) = plan.from_outside
    assert [sae.artefact.key for sae in plan.to_train] == [sae.artefact.key for sae in study.plan.saes]
    shutil.copytree(study.workspace.local, tmp_path / "workspace")
    workspace = Workspace(tmp_path / "workspace")
    assert bring(plan.from_outside, plan.experiment, workspace).made == [theirs]
    made = evaluate(plan, workspace).made
    assert made == [theirs]  # nothing else was evaluated again
    results = collect(plan, workspace)
    (row,) = [row for row in results.rows if row.arm == "theirs"]
    assert (row.backbone, row.penalty, row.steps) == ("jumprelu", "trained by others", None)
    assert row.fvu is not None
    assert row.sparse_probing is not None
    assert not [entry for entry in results.differences if "theirs" in (entry.arm, entry.reference)]
    page = Path(write_report(results, tmp_path / "report")).read_text()
    assert '<td class="kind">trained by others</td>' in page


def test_the_block_in_the_docs_is_a_reference(study: Study, small_toml: Path, tmp_path: Path) -> None:
    (block,) = re.findall(r"```toml\n(\[references.*?)```", (DOCS / "extending.md").read_text(encoding="utf-8"), re.DOTALL)
    jumprelu(tmp_path / "their-sae", study.experiment.model.d_in)
    plan = planned(small_toml, tmp_path, "\n" + block.replace('"their-sae"', '"{}/their-sae"'))
    assert [str(sae) for sae in plan.from_outside] == ["theirs seed 0 layer 2"]


def test_its_key_follows_its_files(study: Study, small_toml: Path, tmp_path: Path) -> None:
    jumprelu(tmp_path / "sae", study.experiment.model.d_in)
    (before,) = planned(small_toml, tmp_path / "sae").from_outside
    shutil.move(tmp_path / "sae", tmp_path / "elsewhere")
    (moved,) = planned(small_toml, tmp_path / "elsewhere").from_outside
    assert moved.artefact.key == before.artefact.key
    weights = tmp_path / "elsewhere" / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    (changed,) = planned(small_toml, tmp_path / "elsewhere").from_outside
    assert changed.artefact.key != before.artefact.key


@pytest.mark.parametrize(
    ("d_in", "metadata", "message"),
    [
        (12, {}, "it reads rows of 12 numbers, the model's rows have 64; remove it"),
        (64, {"hook_name": "blocks.1.hook_resid_post"}, "was trained on layer 1, not on layer 2; set layer = 1"),
        (64, {"model_name": "gpt2"}, "was trained on gpt2, the study's model is tiny-gemma2; remove it"),
    ],
)
def test_a_reference_of_another_place_fails_beside_its_siblings(
    d_in: int, metadata: dict[str, str], message: str, small_toml: Path, tmp_path: Path
) -> None:
    jumprelu(tmp_path / "sae", d_in, **metadata)
    plan = planned(small_toml, tmp_path / "sae")
    assert plan.experiment.model.d_in == 64
    brought = bring(plan.from_outside, plan.experiment, Workspace(tmp_path / "workspace"))
    assert not brought.made
    assert message in brought.failed["theirs seed 0 layer 2"]
    assert not list((tmp_path / "workspace").rglob("cfg.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (THEIRS, "references.theirs.path: {} has no cfg.json: it is no SAE in SAELens' format"),
        (THEIRS.replace("layer = 2", "layer = 1"), "references.theirs.layer: 1 is not among study.layers [2]"),
        (THEIRS.replace("path =", "paht ="), "references.theirs.paht: unknown key, check its spelling or remove it"),
        (THEIRS.replace("theirs", "full"), "references.full: an arm has this name, choose another one"),
        (
            "\n[references.theirs]\nlayer = 2\n",
            "references.theirs: give one of path, a folder, repository, on the Hub, or release, known to SAELens",
        ),
        (
            RELEASE.replace("matryoshka-dc", "matryoshka-cd"),
            "knows no release 'gemma-2-2b-res-matryoshka-cd'; the nearest are gemma-2-2b-res-matryoshka-dc, ",
        ),
        (RELEASE.replace("blocks.2", "blocks.99"), "has no SAE 'blocks.99.hook_resid_post'; the nearest are blocks.9.hook"),
        (RELEASE.replace("sae_id", "folder"), "references.theirs: folder is for a repository; a release has sae_id"),
        (
            RELEASE.replace(COMMIT, "main"),
            "needs `revision`, the 40 hexadecimal digits of a commit, not 'main'; https://hug",
        ),
        (THEIRS + 'revision = "main"\n', "references.theirs: revision and folder are for a repository, and"),
        (
            HUB.replace(COMMIT, "main"),
            "references.theirs: needs `revision`, the 40 hexadecimal digits of a commit, not 'main'",
        ),
    ],
)
def test_what_is_no_reference_is_refused(text: str, message: str, small_toml: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError) as caught:
        planned(small_toml, tmp_path / "nothing", text)
    assert message.format(tmp_path / "nothing") in str(caught.value)


def test_a_repository_is_read_from_the_cache_and_named_by_its_commit(
    study: Study, small_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    plan = planned(small_toml, tmp_path, HUB)
    (theirs,) = plan.from_outside
    assert theirs.artefact.inputs["content"] == {"repository": "org/saes", "revision": COMMIT, "folder": "layer2/wide"}
    workspace = Workspace(tmp_path / "workspace")
    failed = bring(plan.from_outside, plan.experiment, workspace).failed
    assert failed == {str(theirs): "SAE org/saes is not in the local cache, and the Hugging Face Hub cannot be reached"}
    jumprelu(tmp_path / "hub/models--org--saes/snapshots" / COMMIT / "layer2/wide", study.experiment.model.d_in)
    assert bring(plan.from_outside, plan.experiment, workspace).made == [theirs]


def test_a_release_of_saelens_is_read_from_its_commit(
    study: Study, small_toml: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    plan = planned(small_toml, tmp_path, RELEASE)
    (theirs,) = plan.from_outside
    assert theirs.artefact.inputs["content"] == {
        "release": "gemma-2-2b-res-matryoshka-dc",
        "sae_id": "blocks.2.hook_resid_post",
        "revision": COMMIT,
    }
    repository = "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40"
    workspace, missing = Workspace(tmp_path / "workspace"), f"SAE {repository} is not in the local cache, and"
    assert bring(plan.from_outside, plan.experiment, workspace).failed[str(theirs)].startswith(missing)
    place = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    other = "f" * 40
    jumprelu(place / "snapshots" / other / "standard/blocks.2.hook_resid_post", study.experiment.model.d_in)
    (place / "refs").mkdir()
    (place / "refs/main").write_text(other)
    assert bring(plan.from_outside, plan.experiment, workspace).failed[str(theirs)].startswith(missing), "not the branch"
    jumprelu(place / "snapshots" / COMMIT / "standard/blocks.2.hook_resid_post", study.experiment.model.d_in)
    assert bring(plan.from_outside, plan.experiment, workspace).made == [theirs]
    architecture = workspace.require(theirs.artefact, "").facts["architecture"]
    assert architecture == "jumprelu"


def test_the_experiment_on_gemma_names_what_saelens_knows() -> None:
    experiment = Experiment.load(str(DOCS.parent / "experiments" / "gemma-2-2b-references.toml"))
    releases = {reference.release for reference in experiment.references.values()}
    assert "gemma-scope-2b-pt-res-canonical" in releases
    assert {reference.layer for reference in experiment.references.values()} == {5, 12, 19}


def test_an_sae_of_our_own_can_be_a_reference(study: Study, small_toml: Path, tmp_path: Path) -> None:
    """It is the same function in another study, and read back as such."""
    full = next(sae for sae in study.plan.saes if sae.arm == "full")
    export_sae(study.workspace.folder(full.artefact), tmp_path / "sae")
    plan = planned(small_toml, tmp_path / "sae")
    workspace = Workspace(tmp_path / "workspace")
    (theirs,) = bring(plan.from_outside, plan.experiment, workspace).made
    ours, read = (open_sae(sae.artefact, place) for sae, place in ((full, study.workspace), (theirs, workspace)))
    x_BD = torch.randn(20, ours.d_in)
    torch.testing.assert_close(read.encode(x_BD), ours.encode(x_BD))
