"""`dasae export`: what SAELens and sae-bench make of it, and what is refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_study import Study
from typer.testing import CliRunner

from pipeline.artefacts.identity import sealed
from pipeline.artefacts.workspace import Workspace
from pipeline.cli import app
from pipeline.errors import BadInputError, CorruptArtefactError
from pipeline.runtime.compatibility import importing_sae_bench
from pipeline.sae.finished import export_sae, find, load_sae
from pipeline.sae.formats import CARD, CONFIG, WEIGHTS, read_sae
from pipeline.store.batches import rows_in_order
from pipeline.store.reader import ActivationStore

with importing_sae_bench():
    import sae_lens  # a dependency of sae-bench
    from sae_bench.custom_saes.relu_sae import ReluSAE


@pytest.fixture
def copied(study: Study, tmp_path: Path) -> Path:
    """A copy of the folder of the arm `full`, away from any workspace."""
    folder = study.workspace.folder(study.plan.saes[1].artefact)
    return Path(shutil.copytree(folder, tmp_path / folder.name))


def test_saelens_loads_it_with_the_same_latents_and_reconstruction(study: Study, tmp_path: Path) -> None:
    store = ActivationStore(study.workspace.folder(study.plan.store))
    x_BD = next(rows_in_order(store, 2, [store.layout.shards - 1]))
    for planned in study.plan.saes:
        target = tmp_path / "new" / planned.arm
        arguments = ["export", planned.artefact.name, "--to", "saelens", str(target)]
        done = CliRunner().invoke(app, [*arguments, "--workspace", str(study.workspace.root)])
        assert done.exit_code == 0, done.output
        assert {path.name for path in target.parent.rglob("*") if path.is_file()} == {CONFIG, WEIGHTS, CARD}
        exported = sae_lens.SAE.load_from_disk(target)
        ours = read_sae(study.workspace.folder(planned.artefact))
        with torch.no_grad():
            f_BF = exported.encode(x_BD)
            assert (f_BF > 0).any()
            torch.testing.assert_close(f_BF, ours.encode(x_BD), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(exported.decode(f_BF), ours.decode(ours.encode(x_BD)), atol=1e-5, rtol=1e-5)
        assert exported.cfg.architecture() == "standard"
        assert exported.cfg.metadata.hook_name == "blocks.2.hook_resid_post"
        assert exported.cfg.metadata.artefact == planned.artefact.name


def test_its_card_says_how_it_was_made_and_what_was_measured(study: Study, tmp_path: Path) -> None:
    full = next(sae for sae in study.plan.saes if sae.arm == "full")
    arguments = ["export", "full-s0", str(tmp_path / "sae"), "--workspace", str(study.workspace.root)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    card = (tmp_path / "sae" / CARD).read_text()
    assert card.startswith("---\nlibrary_name: sae_lens\n")
    assert f"# {full.artefact.name}" in card
    assert "| hook_name | blocks.2.hook_resid_post |" in card
    assert '"coefficient": 0.1' in card
    file = study.workspace.verified(full.evaluation, "reconstruction.json")
    assert f"| FVU on held-out rows | {json.loads(file.read_text())['fvu']:.4g} |" in card
    assert "| sparse probing, k = 5 | 0." in card
    assert str(tmp_path) not in card
    assert str(study.workspace.root) not in card


def test_a_card_has_no_number_of_a_changed_file(study: Study, tmp_path: Path) -> None:
    shutil.copytree(study.workspace.local, tmp_path / "workspace")
    full = next(sae for sae in study.plan.saes if sae.arm == "full")
    file = tmp_path / "workspace" / full.evaluation.path / "reconstruction.json"
    file.write_text(file.read_text().replace("0.", "1."))
    arguments = ["export", "full-s0", str(tmp_path / "sae"), "--workspace", str(tmp_path / "workspace")]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    card = (tmp_path / "sae" / CARD).read_text()
    assert "FVU" not in card
    assert "sparse probing, k = 1" in card


def test_a_card_of_an_sae_that_was_not_evaluated_says_so(copied: Path, tmp_path: Path) -> None:
    assert CliRunner().invoke(app, ["export", str(copied), str(tmp_path / "sae")]).exit_code == 0
    assert "Nothing: it was not evaluated." in (tmp_path / "sae" / CARD).read_text()


def test_sae_bench_accepts_the_decoder(copied: Path, tmp_path: Path) -> None:
    export_sae(copied, tmp_path / "exported")
    exported = sae_lens.SAE.load_from_disk(tmp_path / "exported")
    theirs = ReluSAE(exported.cfg.d_in, exported.cfg.d_sae, "tiny", 2, torch.device("cpu"), torch.float32)
    theirs.load_state_dict(exported.state_dict())
    assert theirs.check_decoder_norms()
    theirs.W_dec.data *= 1.01
    assert not theirs.check_decoder_norms()


def test_an_sae_is_found_by_path_name_and_label(study: Study, copied: Path) -> None:
    workspace, artefact = study.workspace, study.plan.saes[1].artefact
    assert find("full-s0", workspace) == find(artefact.name, workspace) == workspace.folder(artefact)
    assert find(str(copied), workspace) == copied
    with pytest.raises(BadInputError, match=r"no finished SAE 'ful-s0', .* which has: baseline-s0, full-s0, magnitude-s0$"):
        find("ful-s0", workspace)
    with pytest.raises(BadInputError, match="which has: none"):
        find("full-s0", Workspace(workspace.local / "elsewhere"))


def test_a_label_of_several_saes_names_them(copied: Path, tmp_path: Path) -> None:
    saes = tmp_path / "workspace" / "saes"
    shutil.copytree(copied, saes / copied.name)
    manifest = json.loads((copied / "manifest.json").read_text())
    manifest["inputs"]["layer"], manifest["key"] = 1, "0123456789ab"
    shutil.copytree(copied, saes / "full-s0-0123456789ab")
    (saes / "full-s0-0123456789ab" / "manifest.json").write_text(json.dumps(sealed(manifest)))
    with pytest.raises(BadInputError) as caught:
        find("full-s0", Workspace(tmp_path / "workspace"))
    assert "'full-s0' is more than one SAE" in str(caught.value)
    assert "full-s0-0123456789ab (layer 1)" in str(caught.value)
    assert f"{copied.name} (layer 2)" in str(caught.value)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
@pytest.mark.parametrize("damage", ["changed", "missing"])
def test_a_damaged_sae_is_not_exported(copied: Path, tmp_path: Path, name: str, damage: str) -> None:
    content = bytearray((copied / name).read_bytes())
    content[-3] ^= 1
    (copied / name).unlink()
    if damage == "changed":
        (copied / name).write_bytes(content)
    with pytest.raises(CorruptArtefactError, match=f"{name} is missing or was changed"):
        export_sae(copied, tmp_path / "exported")
    assert sorted(path.name for path in tmp_path.iterdir()) == [copied.name]


def test_what_is_no_sae_is_not_exported(study: Study, copied: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="is no SAE: its manifest says stores"):
        export_sae(study.workspace.folder(study.plan.store), tmp_path / "exported")
    (copied / "manifest.json").write_text("{")
    with pytest.raises(CorruptArtefactError, match=r"manifest\.json cannot be read"):
        export_sae(copied, tmp_path / "exported")


def test_only_a_new_or_empty_folder_is_written(copied: Path, tmp_path: Path) -> None:
    target = tmp_path / "exported"
    target.mkdir()
    export_sae(copied, target)
    before = (target / WEIGHTS).read_bytes()
    with pytest.raises(BadInputError, match="is not an empty folder"):
        export_sae(copied, target)
    assert (target / WEIGHTS).read_bytes() == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(BadInputError, match="is not an empty folder"):
        export_sae(copied, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_export_goes_into_the_folder_in_which_somebody_works_and_clears_what_a_killed_one_left(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    export_sae(copied, Path())
    assert sorted(path.name for path in here.iterdir()) == ["cfg.json", WEIGHTS]
    (tmp_path / ".export-there-x" / "sae").mkdir(parents=True)
    (tmp_path / ".export-elsewhere-x").mkdir()
    export_sae(copied, tmp_path / "there")
    assert sorted(path.name for path in tmp_path.glob(".export-*")) == [".export-elsewhere-x"]


def test_an_export_that_fails_leaves_nothing(copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("pipeline.sae.formats.save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        export_sae(copied, tmp_path / "exported")
    assert sorted(path.name for path in tmp_path.iterdir()) == [copied.name]


def test_two_saes_that_changed_places_are_told(study: Study, tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    first, second = (sae.artefact for sae in study.plan.saes[:2])
    for source, target in ((first, second), (second, first)):
        shutil.copytree(study.workspace.folder(source), workspace.folder(target))
    for place in (str(workspace.folder(first)), first.name):
        with pytest.raises((CorruptArtefactError, BadInputError), match=f"{second.key}"):
            load_sae(place, workspace)
    renamed = Path(shutil.copytree(study.workspace.folder(first), tmp_path / "mine"))
    assert load_sae(renamed, workspace).d_sae == 96


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "is not the configuration of an SAE"),
        ({"architecture": "standard", "metadata": None}, "is not the configuration of an SAE"),
        ({"architecture": "standard", "metadata": 7}, "is not the configuration of an SAE"),
        ({"architecture": "none", "metadata": {}}, "architecture 'none' is not one of"),
        ("{", "cannot be read: Expecting"),
    ],
)
def test_a_configuration_that_means_nothing_is_one_line(copied: Path, config: object, says: str) -> None:
    (copied / "cfg.json").write_text(config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(CorruptArtefactError, match=says):
        read_sae(copied)


@pytest.mark.parametrize(("name", "shape"), [("b_enc", (3,)), ("W_dec", (2, 2)), ("more", (1,)), ("W_enc", ())])
def test_weights_that_do_not_fit_each_other_are_one_line(copied: Path, name: str, shape: tuple[int, ...]) -> None:
    tensors = load_file(copied / WEIGHTS)
    save_file(tensors | {name: torch.zeros(shape)}, copied / WEIGHTS)
    with pytest.raises(CorruptArtefactError, match="which is no SAE"):
        read_sae(copied)
