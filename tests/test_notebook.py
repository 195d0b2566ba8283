"""What `from pipeline import ...` gives a notebook: cheap to import, and the same numbers as the stages'."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_study import Study

import pipeline
from pipeline.errors import BadInputError, CorruptArtefactError, MissingArtefactError
from pipeline.report.collect import collect
from pipeline.report.page import write_report
from pipeline.sae.finished import open_sae
from pipeline.sae.formats import WEIGHTS
from pipeline.store.documents import Documents
from pipeline.texts.labelled import load_texts


def test_importing_the_package_imports_nothing_heavy() -> None:
    check = "import sys, pipeline; print([m for m in ('torch', 'transformers', 'zarr', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there_and_documented() -> None:
    assert sorted(pipeline.__all__) == sorted(pipeline._HOMES)
    for name in pipeline.__all__:
        assert getattr(pipeline, name).__doc__, name
        assert name in dir(pipeline)
    with pytest.raises(AttributeError, match="module 'pipeline' has no attribute 'Sae'"):
        pipeline.Sae  # noqa: B018


def test_a_text_is_read_as_extraction_read_it(study: Study) -> None:
    """Texts of a probe data set, against the rows that its store holds of them."""
    reader = pipeline.TextReader(study.plan, study.workspace)
    (name, artefact), *_ = study.plan.probes.items()
    store = pipeline.ActivationStore(study.workspace.storage(artefact))
    train, _ = load_texts(name, study.experiment.probes)
    compared = 0
    documents_NLD = next(Documents(store, 2).padded("train", 5))[1].float()
    for text, stored_LD in zip(train[store.layout.classes[0]][:5], documents_NLD, strict=True):
        count = int(stored_LD.any(dim=1).sum())
        ids = reader.model.tokenizer(text, add_special_tokens=False)["input_ids"]
        read = reader(reader.model.tokenizer.decode(ids[:count], clean_up_tokenization_spaces=False))
        assert sorted(read.layers) == [1, 2]
        if len(read.tokens) == count:  # cut in the middle of a character, a text has other tokens
            torch.testing.assert_close(read.layers[2], stored_LD[1 : count + 1], atol=2e-2, rtol=2e-2)
            assert read.layers[2].dtype == torch.float32
            compared += 1
    assert compared >= 3


def test_what_cannot_be_read_is_said_in_a_line(study: Study, tmp_path: Path) -> None:
    reader = pipeline.TextReader(study.plan, study.workspace)
    with pytest.raises(BadInputError, match="tokens, a sequence of this study has room for 31 after BOS: cut it"):
        reader("words " * 100)
    with pytest.raises(BadInputError, match="has no tokens"):
        reader("")
    with pytest.raises(MissingArtefactError, match="make it with: dasae extract"):
        pipeline.TextReader(study.plan, pipeline.Workspace(tmp_path))


def test_an_sae_is_loaded_by_name_and_verified(study: Study, tmp_path: Path) -> None:
    full = study.plan.saes[1]
    sae = pipeline.load_sae("full-s0", study.workspace)
    expected = open_sae(full.artefact, study.workspace)
    assert torch.equal(sae.W_dec_FD, expected.W_dec_FD)
    assert (sae.d_in, sae.d_sae) == (64, 96)
    copied = Path(shutil.copytree(study.workspace.folder(full.artefact), tmp_path / "sae"))
    assert torch.equal(pipeline.load_sae(copied, study.workspace).b_dec_D, sae.b_dec_D)
    content = bytearray((copied / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (copied / WEIGHTS).write_bytes(content)
    with pytest.raises(CorruptArtefactError, match="was changed"):
        pipeline.load_sae(copied, study.workspace)
    with pytest.raises(BadInputError, match="no finished SAE 'ful-s0'"):
        pipeline.load_sae("ful-s0", study.workspace)


def test_results_are_a_data_frame(study: Study, tmp_path: Path) -> None:
    workspace = pipeline.Workspace(tmp_path)
    with pytest.raises(MissingArtefactError, match="make it with: dasae report"):
        pipeline.read_results(study.experiment, workspace)
    results = collect(study.plan, study.workspace)
    write_report(results, workspace.report(study.experiment.name))
    frame = pipeline.read_results(study.experiment, workspace)
    assert list(frame["arm"]) == ["baseline", "full", "magnitude"]
    assert list(frame["fvu"]) == [row.fvu for row in results.rows]
    assert list(frame["sae"]) == [sae.artefact.key for sae in study.plan.saes]
    differences = pipeline.read_results(study.experiment, workspace, "differences")
    assert len(differences) == len(results.differences)
    table = tmp_path / "reports" / study.experiment.name / "results.csv"
    whole = table.read_text()
    table.write_text(whole.replace("0.", "1.", 1))
    with pytest.raises(CorruptArtefactError, match="was changed after it was written; make it with: dasae report"):
        pipeline.read_results(study.experiment, workspace)
    table.write_text("")
    with pytest.raises(CorruptArtefactError, match="was changed after it was written"):
        pipeline.read_results(study.experiment, workspace)
