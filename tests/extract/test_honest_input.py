"""Input that would give numbers that mislead is refused or told, before the forward pass that would be lost."""

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from small_store import SHARD_ROWS, filled, numbered
from small_study import Study
from typer.testing import CliRunner

from pipeline.artefacts.manifest import Artefact
from pipeline.artefacts.workspace import Workspace
from pipeline.cli import app
from pipeline.errors import BadInputError
from pipeline.extract import fill
from pipeline.extract.estimate import describe
from pipeline.extract.extraction import Extraction
from pipeline.extract.new_stores import write_corpus_store
from pipeline.models.model_section import HuggingFaceModel
from pipeline.runtime.progress import Advance, progress, watched_by
from pipeline.store.batches import split_shards
from pipeline.store.norms import massive_rows
from pipeline.study.plan import Plan, make_plan
from pipeline.texts.text_sections import FilesCorpus


def publish(root: Path, values_RD: torch.Tensor, row_order: str = "shuffled") -> tuple[Path, dict[str, object]]:
    artefact, workspace = Artefact(kind="stores", label="small", inputs={}), Workspace(root)
    filled(workspace.folder(artefact), values_RD, row_order=row_order)
    fill.publish(artefact, workspace, 0.0)
    manifest = workspace.manifest(artefact)
    assert manifest
    return workspace.folder(artefact), manifest.facts


def test_massive_rows_are_told_with_the_remedy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values_RD = torch.randn(4 * SHARD_ROWS, 8, generator=torch.Generator().manual_seed(0))
    publish(tmp_path / "ordinary", values_RD.bfloat16())
    assert "massive" not in capsys.readouterr().err
    for row in (3, 70, 150, 200):
        values_RD[row] *= 170
    folder, facts = publish(tmp_path / "massive", values_RD.bfloat16())
    said = capsys.readouterr().err
    assert "layer 3: 4 of 256 rows have more than 10 times the median norm and 99." in said
    assert "leave them out with store.max_norm = 10" in said
    assert [f"small: {remark}\n" for remark in massive_rows(facts)] == [said]
    assert "store.max_norm = 10" in " ".join(CliRunner().invoke(app, ["store", "info", str(folder)]).output.split())
    # max_norm leaves out no row of a store in document order.
    publish(tmp_path / "document", values_RD.bfloat16(), row_order="document")
    assert not capsys.readouterr().err


def short_corpus(folder: Path, letters: int) -> FilesCorpus:
    (folder / "short.txt").write_text("some words of text " * (letters // 19))
    return FilesCorpus(source="files", paths=(str(folder / "short.txt"),), text_column="text")


def shorter(study: Study, corpus: FilesCorpus) -> Plan:
    return make_plan(study.experiment.model_copy(update={"corpus": corpus}))


def test_what_is_asked_and_what_the_corpus_holds_stand_side_by_side(study: Study, tmp_path: Path) -> None:
    corpus = short_corpus(tmp_path, 19_000)
    said = describe(shorter(study, corpus))
    assert "activations  20,000 rows" in said
    assert "corpus       1 files, 19.0 kB: about 4,750 tokens, fewer than the 20,000 asked for (store.tokens)" in said


def test_a_corpus_too_short_to_train_on_is_refused_before_the_forward_pass(
    study: Study, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study.plan.model
    tokenizer = transformers.AutoTokenizer.from_pretrained(study.workspace.folder(study.plan.model))
    corpus = short_corpus(tmp_path, 5_000)
    with pytest.raises(BadInputError, match="heldout_shards 1 leaves nothing to train on: the store has 1 shards of 4096"):
        write_corpus_store(shorter(study, corpus), Workspace(tmp_path / "ws"), corpus, tokenizer, lambda _: None)
    assert "rows of the 20,000 asked for (store.tokens)" in capsys.readouterr().err


def test_two_held_out_rows_measure_nothing(study: Study, tmp_path: Path) -> None:
    store = filled(tmp_path / "store", numbered(2 * SHARD_ROWS + 2))
    with pytest.raises(BadInputError, match=r"holds out 2 rows, and fewer than 256 measure nothing: set it to 2, or"):
        split_shards(store, 1)
    assert split_shards(filled(tmp_path / "enough", numbered(6 * SHARD_ROWS)), 4) == ([0, 1], [2, 3, 4, 5])
    tokens = study.experiment.store.model_copy(update={"tokens": 2 * 4096 + 2})
    plan = make_plan(study.experiment.model_copy(update={"store": tokens}))
    assert plan.model
    with pytest.raises(BadInputError, match="holds out 2 rows"):
        Extraction(plan, Workspace(tmp_path / "ws")).prepare()
    assert not Workspace(tmp_path / "ws").storage(plan.store).sizes()


def test_a_tokenizer_larger_than_the_embedding_is_refused_before_any_work(study: Study, tmp_path: Path) -> None:
    assert study.plan.model
    source, folder = study.workspace.folder(study.plan.model), str(tmp_path / "model")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    transformers.AutoModelForCausalLM.from_pretrained(source).save_pretrained(folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    model = HuggingFaceModel(source="huggingface", name=folder, d_in=64, depth=4, dtype="float32")
    plan = replace(study.plan, model=None, experiment=study.experiment.model_copy(update={"model": model}))
    workspace = Workspace(tmp_path / "ws")
    with pytest.raises(BadInputError, match=r"gives token 512, and the model's embedding ends at 511: .*\[PAD\]"):
        Extraction(plan, workspace).prepare()
    assert not workspace.storage(plan.store).sizes()


def test_progress_never_passes_its_total() -> None:
    told: list[int] = []

    @contextmanager
    def watch(_title: str, _total: int, _unit: str) -> Generator[Advance]:
        yield lambda amount=1, remark="": told.append(amount)

    with watched_by(watch), progress("work", 10, "rows") as advance:
        for _ in range(4):
            advance(4)
    assert told == [4, 4, 2, 0]
