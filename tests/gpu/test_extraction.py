"""Extraction on a GPU that is not there: the rows of the CPU's run, and few waits."""

from collections import Counter

import pytest
import torch
from pretend_gpu import PretendedGpu
from small_study import Study

from pipeline.extract.shards import run_shard
from pipeline.store import format as fmt
from pipeline.store.reader import ActivationStore
from pipeline.study.study_model import open_study_model


def test_a_shard_is_the_same_and_the_host_waits_for_its_layers_only(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ActivationStore(study.workspace.folder(study.plan.store))
    sequences, layout = fmt.read_sequences(store.storage), store.layout
    expected = run_shard(0, layout, sequences, open_study_model(study.plan, study.workspace), 8)
    with PretendedGpu() as gpu:
        monkeypatch.setenv("DASAE_DEVICE", "cuda")
        model = open_study_model(study.plan, study.workspace)
        assert model.device.type == "cuda"
        gpu.reset()
        rows = run_shard(0, layout, sequences, model, 8)
    for layer, expected_RD in expected.layers.items():
        assert rows.layers[layer].device == torch.device("cpu")
        torch.testing.assert_close(rows.layers[layer], expected_RD)
    waits = Counter({what: sum(count for (kind, _), count in gpu.waits.items() if kind == what) for what, _ in gpu.waits})
    forwards = gpu.waits["copy to the device", _line_of(gpu, "models/language.py")]
    assert waits["copy from the device"] == len(layout.layers)
    assert waits["copy to the device"] == 2 * forwards + 1  # tokens, and which of them are rows; once the order of the rows
    # transformers asks twice whether a batch is packed.
    assert waits["item"] <= 2 * forwards
    assert set(waits) == {"copy from the device", "copy to the device", "item"}


def _line_of(gpu: PretendedGpu, file: str) -> str:
    (line,) = {line for (what, line) in gpu.waits if what == "copy to the device" and line.startswith(file)}
    return line
