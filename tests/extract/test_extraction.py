"""Extraction on the small study: what is stored is what the model computes, and every row knows where it comes from."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from small_study import Study

from pipeline.artefacts.workspace import Workspace
from pipeline.errors import BadInputError
from pipeline.extract.extraction import extract
from pipeline.models.language import ResidualStream
from pipeline.models.model_section import HuggingFaceModel
from pipeline.store.reader import ActivationStore
from pipeline.study.plan import make_plan
from pipeline.study.study_model import open_study_model
from pipeline.texts import packing
from pipeline.texts.corpus import corpus_texts
from pipeline.texts.text_sections import FilesCorpus


@pytest.fixture(scope="module")
def model_folder(study: Study) -> str:
    assert study.plan.model is not None
    return str(study.workspace.folder(study.plan.model))


@pytest.fixture(scope="module")
def full_model(model_folder: str) -> Any:
    return transformers.AutoModel.from_pretrained(model_folder, attn_implementation="eager", dtype=torch.float32).eval()


def test_the_early_exit_computes_what_the_whole_model_does(study: Study, model_folder: str, full_model: Any) -> None:
    tokens_SL = torch.randint(4, 512, (3, 32), generator=torch.Generator().manual_seed(0))
    cut = ResidualStream(model_folder, layers=(1, 2), dtype="float32")
    assert len(cut.model.layers) == 3
    assert len(full_model.layers) == study.experiment.model.depth == 4
    outputs = cut(tokens_SL)
    with torch.no_grad():
        hidden = full_model(tokens_SL, output_hidden_states=True).hidden_states
    assert torch.equal(outputs[1], hidden[2])
    assert torch.equal(outputs[2], hidden[3])


def test_the_last_layer_is_taken_before_the_final_norm(model_folder: str, full_model: Any) -> None:
    tokens_SL = torch.randint(4, 512, (2, 32), generator=torch.Generator().manual_seed(0))
    last = ResidualStream(model_folder, layers=(3,), dtype="float32")(tokens_SL)[3]
    with torch.no_grad():
        normalised = full_model(tokens_SL, output_hidden_states=True).hidden_states[-1]
        assert torch.allclose(full_model.norm(last), normalised, atol=1e-6)
    assert not torch.allclose(last, normalised, atol=1e-2)


def test_padding_on_the_right_changes_nothing(model_folder: str) -> None:
    model = ResidualStream(model_folder, layers=(2,), dtype="float32")
    tokens_SL = torch.randint(4, 512, (1, 20), generator=torch.Generator().manual_seed(0))
    padded_SL = torch.nn.functional.pad(tokens_SL, (0, 12), value=0)
    torch.testing.assert_close(model(padded_SL)[2][:, :20], model(tokens_SL)[2], atol=1e-5, rtol=1e-5)


def test_every_row_is_the_activation_of_the_token_it_names(study: Study, full_model: Any) -> None:
    store = ActivationStore(study.workspace.folder(study.plan.store))
    rows = store.rows
    assert rows == study.experiment.store.tokens
    fields = {name: store.read_field(name, 0, rows) for name in ("doc_id", "sequence", "position", "token_id")}
    tokens_SL, doc_starts = store.whole("tokens"), store.whole("doc_starts")
    assert (tokens_SL[fields["sequence"], fields["position"]] == fields["token_id"]).all()
    assert not np.isin(fields["token_id"], store.layout.special_ids).any()
    places = fields["sequence"].astype(np.int64) * tokens_SL.shape[1] + fields["position"]
    assert len(np.unique(places)) == rows
    assert (doc_starts[fields["doc_id"]] <= places).all()
    later = doc_starts[np.minimum(fields["doc_id"] + 1, len(doc_starts) - 1)]
    assert ((places < later) | (fields["doc_id"] == len(doc_starts) - 1)).all()

    some = [0, 5, 4095, 4096, 12_345, rows - 1]
    with torch.no_grad():
        hidden = full_model(torch.from_numpy(tokens_SL[fields["sequence"][some]]).long(), output_hidden_states=True)
    for index, row in enumerate(some):
        expected = hidden.hidden_states[3][index, fields["position"][row]].bfloat16().float()
        torch.testing.assert_close(store.read(2, row, row + 1)[0].float(), expected, atol=0.02, rtol=0.02)


def test_rows_are_shuffled_inside_their_shard_and_shards_are_not(study: Study) -> None:
    store = ActivationStore(study.workspace.folder(study.plan.store))
    sequence = store.read_field("sequence", 0, store.rows)
    size = store.layout.shard_rows
    assert (np.diff(sequence[:size]) < 0).any()
    for start in range(size, store.rows, size):
        assert sequence[:start].max() <= sequence[start : start + size].min()


def test_a_model_that_is_not_what_the_experiment_declares_is_refused(study: Study, model_folder: str) -> None:
    declared = HuggingFaceModel(source="huggingface", name=model_folder, d_in=64, depth=5, dtype="float32")
    plan = replace(study.plan, experiment=study.experiment.model_copy(update={"model": declared}))
    with pytest.raises(BadInputError, match="has d_in 64 and depth 4, the experiment declares d_in 64 and depth 5"):
        open_study_model(plan, study.workspace)
    with pytest.raises(BadInputError, match=r"layer 4 does not exist, .* has 0 to 3"):
        ResidualStream(model_folder, layers=(4,), dtype="float32")


def test_probe_texts_longer_than_the_model_s_positions_are_refused_before_anything_is_extracted(study: Study) -> None:
    probes = study.experiment.probes.model_copy(update={"context": 10_000})
    plan = replace(study.plan, experiment=study.experiment.model_copy(update={"probes": probes}))
    with pytest.raises(BadInputError, match=r"positions, fewer than a context of 10000: lower store\.context or probes"):
        open_study_model(plan, study.workspace)


def test_a_local_model_and_a_local_corpus_go_the_same_way(model_folder: str, small_toml: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    lines = [json.dumps({"body": f"def function_{n}(x):\n    return x + {n}\n" * 20}) for n in range(200)]
    (texts / "train.jsonl").write_text("\n".join(lines))
    text = small_toml.read_text()
    text = text.replace(
        'source = "tiny"\nsteps = 150\nbatch_size = 8\nvocabulary = 512',
        f'source = "huggingface"\nname = "{model_folder}"\nd_in = 64\ndepth = 4\ndtype = "float32"',
    ).replace('source = "python"', f'source = "files"\npaths = ["{texts}/*.jsonl"]\ntext_column = "body"')
    small_toml.write_text(text)
    from pipeline.study.experiment import Experiment

    plan, workspace = make_plan(Experiment.load(str(small_toml))), Workspace(tmp_path / "ws")
    assert plan.model is None
    made = extract(plan, workspace)
    assert made == [plan.store, *plan.probes.values()]
    assert ActivationStore(workspace.folder(plan.store)).rows == 20_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds no text"),
        ('{"body": "too short"}', "tokens, which is less than one context of 32"),
        ('{"other": "column"}', "has no column 'body'"),
    ],
)
def test_a_corpus_that_cannot_be_used_is_one_line(study: Study, tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "train.jsonl").write_text(content)
    config = FilesCorpus(source="files", paths=(str(tmp_path / "train.jsonl"),), text_column="body")
    assert study.plan.model is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(study.workspace.folder(study.plan.model))
    with pytest.raises(BadInputError, match=message):
        packing.pack(corpus_texts(config), tokenizer, context=32, rows=1000)
