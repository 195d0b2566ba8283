import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_study import SMALL, Study
from tiny_models import CONFIGS, D_IN, save_model

from pipeline.artefacts.workspace import Workspace
from pipeline.evaluate.loss import SplicedLoss, heldout_sequences
from pipeline.extract.extraction import extract
from pipeline.models.language import LanguageModel, transformers
from pipeline.sae.sae import SAE
from pipeline.store.batches import split_shards
from pipeline.store.reader import ActivationStore
from pipeline.store.text_arrays import StoredArray
from pipeline.study.evaluations import EVALUATIONS
from pipeline.study.experiment import Experiment
from pipeline.study.plan import make_plan

LAYER, SPECIAL = 1, (0, 1, 2)


def sequences() -> torch.Tensor:
    tokens_SL = torch.randint(4, 250, (6, 12), generator=torch.Generator().manual_seed(0))
    tokens_SL[:, 0] = 2
    tokens_SL[3, 5] = 2  # a document that begins inside a sequence
    return tokens_SL


def random_sae() -> SAE:
    generator = torch.Generator().manual_seed(3)
    W_dec_FD = torch.nn.functional.normalize(torch.randn(48, D_IN, generator=generator), dim=1)
    return SAE(W_enc_DF=W_dec_FD.T, b_enc_F=torch.full((48,), -0.05), W_dec_FD=W_dec_FD, b_dec_D=torch.ones(D_IN))


def text(tokens_SL: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[token not in SPECIAL for token in sequence] for sequence in tokens_SL.tolist()])


@pytest.mark.parametrize("family", ["gemma-2", "gpt-2", "gpt-j"])
def test_losses_are_those_of_the_model_run_by_hand_with_its_stream_replaced(family: str, tmp_path: Path) -> None:
    place = save_model(tmp_path / family, CONFIGS[family])
    tokens_SL, sae, mean_D = sequences(), random_sae(), torch.linspace(-1, 1, D_IN)
    measured = SplicedLoss(LanguageModel(str(place), dtype="float32"), LAYER, tokens_SL, text(tokens_SL), mean_D).compute(
        sae
    )

    model = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, attn_implementation="eager").eval()
    layers = model.model.layers if family == "gemma-2" else model.transformer.h
    text_SL = text(tokens_SL)

    def loss(replacement) -> float:
        def hook(module, inputs, output):
            x_SLD = output[0] if isinstance(output, tuple) else output
            changed = x_SLD.clone()
            changed[text_SL] = replacement(x_SLD[text_SL])
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = layers[LAYER].register_forward_hook(hook)
        with torch.no_grad():
            log_probability = model(tokens_SL).logits.log_softmax(dim=-1)
        handle.remove()
        terms = [
            -float(log_probability[s, place - 1, tokens_SL[s, place]])
            for s in range(6)
            for place in range(1, 12)
            if text_SL[s, place]
        ]
        assert len(terms) == measured["tokens"] == 6 * 11 - 1
        return sum(terms) / len(terms)

    expected = {
        "clean": loss(lambda rows: rows),
        "sae": loss(lambda rows: sae.decode(sae.encode(rows))),
        "zero": loss(torch.zeros_like),
        "mean": loss(lambda rows: mean_D.expand_as(rows)),
    }
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value, abs=1e-4), name
    assert len({round(value, 4) for value in expected.values()}) == 4
    for name in ("zero", "mean"):
        share = (expected[name] - expected["sae"]) / (expected[name] - expected["clean"])
        if expected[name] > expected["clean"]:
            assert measured["recovered"][name] == pytest.approx(share, rel=0.05)
        else:
            assert measured["recovered"][name] is None
            assert f"{name} ablation does not raise the loss" in measured["reason"]


class Uniform:
    """A model that no replacement disturbs."""

    def next_token_loss(self, tokens_SL: torch.Tensor, layer: int, replace: object) -> torch.Tensor:
        return torch.ones(len(tokens_SL), tokens_SL.shape[1] - 1)


def test_where_ablation_does_not_raise_the_loss_nothing_can_be_recovered() -> None:
    measured = SplicedLoss(Uniform(), LAYER, sequences(), text(sequences()), torch.zeros(D_IN)).compute(random_sae())  # type: ignore[arg-type]
    assert measured["recovered"] == {"zero": None, "mean": None}
    assert measured["reason"] == "zero ablation does not raise the loss; mean ablation does not raise the loss"
    assert measured["clean"] == 1


def test_sequences_are_whole_and_held_out(study: Study) -> None:
    store = ActivationStore(study.workspace.folder(study.plan.store))
    training, heldout = split_shards(store, 1)
    (few, _), (all_there, rows_SL) = (heldout_sequences(store, heldout, tokens) for tokens in (100, 10**9))
    trained_on = {int(sequence) for shard in training for sequence in store.read_field("sequence", *store.row_range(shard))}
    held = store.read_field("sequence", *store.row_range(heldout[0]))
    tokens_SL = store.whole("tokens")
    special = store.layout.special_ids

    def whole(sequence: int) -> bool:
        return int((held == sequence).sum()) == int((~np.isin(tokens_SL[sequence], special)).sum())

    expected = [sequence for sequence in np.unique(held).tolist() if sequence not in trained_on and whole(sequence)]
    assert torch.equal(all_there, torch.from_numpy(tokens_SL[expected]).long())
    assert torch.equal(few, all_there[: len(few)])
    rows = [int((held == sequence).sum()) for sequence in expected]
    assert sum(rows[: len(few)]) >= 100 > sum(rows[: len(few) - 1])
    assert torch.equal(rows_SL, ~torch.isin(all_there, torch.tensor(special)))


def test_the_tokens_of_the_whole_store_are_never_read_at_once(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ActivationStore, "whole")
    read: list[int] = []
    part = StoredArray.read
    monkeypatch.setattr(
        StoredArray, "read", lambda self, start, stop: (read.append(stop - start), part(self, start, stop))[1]
    )
    store = ActivationStore(study.workspace.folder(study.plan.store))
    _, heldout = split_shards(store, 1)
    tokens_SL, _ = heldout_sequences(store, heldout, 100)
    assert max(read) == len(tokens_SL)


def test_rows_that_were_left_out_are_not_replaced(study: Study, tmp_path: Path) -> None:
    toml = tmp_path / "small.toml"
    toml.write_text(SMALL.replace("[store]", "[store]\nmax_norm = 1.2"))
    plan, workspace = make_plan(Experiment.load(str(toml))), Workspace(tmp_path / "workspace")
    shutil.copytree(study.workspace.local / "models", workspace.local / "models")
    extract(plan, workspace)
    store = ActivationStore(workspace.storage(plan.store))
    _, heldout = split_shards(store, 1)
    start, stop = store.row_range(heldout[0])
    sequence, position = (store.read_field(name, start, stop) for name in ("sequence", "position"))
    tokens_SL, rows_SL = heldout_sequences(store, heldout, 10**9)
    text_SL = ~torch.isin(tokens_SL, torch.tensor(store.layout.special_ids))
    assert 0 < int((text_SL & ~rows_SL).sum()) < int(text_SL.sum())
    assert not (rows_SL & ~text_SL).any()
    first = int(np.flatnonzero((store.whole("tokens") == tokens_SL[0].numpy()).all(axis=1))[0])
    kept = {(int(s), int(p)) for s, p in zip(sequence, position, strict=True) if first <= s < first + len(tokens_SL)}
    assert {(first + s, p) for s, p in rows_SL.nonzero().tolist()} == kept


def test_the_study_s_model_loses_its_loss_with_nothing_in_its_stream(study: Study) -> None:
    for planned in study.plan.saes:
        loss = json.loads((study.workspace.folder(planned.evaluation) / EVALUATIONS["loss"].file).read_text())
        assert loss["clean"] < loss["zero"]
        assert 0 < loss["recovered"]["zero"] <= 1.1
        assert 0 < loss["tokens"] <= 8192 + 32
