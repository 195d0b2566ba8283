"""The table of evaluations on the bench: what is computed, how often rows are encoded, and adding an entry."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_study import Study

from pipeline.errors import DegenerateSAEError
from pipeline.evaluate import heldout, pair_statistics, pairs
from pipeline.evaluate.bench import Bench, LayerBench, ProbeScores
from pipeline.evaluate.evaluation import write_evaluations
from pipeline.evaluate.reconstruction import measure_reconstruction
from pipeline.sae.formats import read_sae
from pipeline.sae.sae import SAE
from pipeline.study.evaluations import EVALUATIONS, Evaluation, Need
from pipeline.study.stage_code import imported

PROBING = EVALUATIONS["sparse_probing"]


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Evaluation]:
    """The table without what needs probe scores, for a test to change."""
    changed = {name: evaluation for name, evaluation in EVALUATIONS.items() if Need.probes not in evaluation.needs}
    monkeypatch.setattr("pipeline.evaluate.evaluation.EVALUATIONS", changed)
    return changed


@pytest.fixture
def bench(study: Study) -> Callable[[], Bench]:
    """Makes a bench with the arm `full` on it, and no probe scores."""

    def make() -> Bench:
        planned = study.plan.saes[1]
        sae = read_sae(study.workspace.folder(planned.artefact))
        scores = ProbeScores(model={}, sae=DegenerateSAEError("it was not probed"))
        return Bench(LayerBench(study.plan, 2, study.workspace), planned, sae, scores)

    return make


def encoded_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the store that `SAE.encode` gets, call by call; the spliced model's come as whole sequences."""
    counts: list[int] = []
    encode = SAE.encode

    def counted(self: SAE, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 2:
            counts.append(len(x))
        return encode(self, x)

    monkeypatch.setattr(SAE, "encode", counted)
    return counts


@pytest.mark.parametrize(("block_bytes", "kept_bytes", "loops"), [(2**26, 2**30, 1), (96 * 4 * 40, 2**30, 1), (2**26, 0, 3)])
def test_held_out_rows_are_encoded_once_by_each_of_the_sae_its_baseline_and_the_random_ones(
    study: Study, bench: Callable[[], Bench], table: dict[str, Evaluation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    block_bytes: int, kept_bytes: int, loops: int,
) -> None:  # fmt: skip
    monkeypatch.setattr(pairs, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(heldout, "KEPT_BYTES", kept_bytes)
    counts, on = encoded_rows(monkeypatch), bench()
    write_evaluations(on, tmp_path, [])
    rows = on.once(measure_reconstruction).rows
    draws = on.config.null_draws
    # Of the SAE: its sums, its pairs, its examples. Of the baseline: its sums, its pairs. Of each random one: its firings,
    # its pairs.
    assert sum(counts) == rows * (2 + draws if loops == 1 else 3 + 2 + 2 * draws)
    if block_bytes == 2**26:  # sums over other blocks are the same only up to rounding
        published = study.workspace.folder(on.planned.evaluation)
        for path in tmp_path.iterdir():
            assert path.read_bytes() == (published / path.name).read_bytes(), path.name


def test_an_evaluation_is_a_function_and_an_entry(
    bench: Callable[[], Bench], table: dict[str, Evaluation], tmp_path: Path
) -> None:
    calls: list[Bench] = []

    def strongest(on: Bench) -> torch.Tensor:
        calls.append(on)
        return torch.stack([f_BF.amax(dim=0) for f_BF in on.latents]).amax(dim=0)

    def compute(on: Bench) -> dict[str, Any]:
        return {"strongest": float(on.once(strongest).max()), "again": float(on.once(strongest).max())}

    table.clear()
    table["strength"] = Evaluation(name="strength", file="strength.json", compute=compute, show=dict)
    table["truth"] = Evaluation(
        name="truth", file="truth.json", needs=frozenset({Need.truth}), compute="never.looked:for", show=dict
    )
    on = bench()
    write_evaluations(on, tmp_path, [])
    assert [path.name for path in tmp_path.iterdir()] == ["strength.json"]
    written = json.loads((tmp_path / "strength.json").read_text())
    assert written["strongest"] == written["again"] == max(float(f_BF.max()) for f_BF in on.latents)
    assert calls == [on]


def test_a_degenerate_sae_keeps_the_files_from_before_it_was_found_out(
    bench: Callable[[], Bench], table: dict[str, Evaluation], tmp_path: Path
) -> None:
    reconstruction = table["reconstruction"]
    table.clear()
    table.update({"reconstruction": reconstruction, PROBING.name: PROBING})
    with pytest.raises(DegenerateSAEError, match="it was not probed"):
        write_evaluations(bench(), tmp_path, [])
    assert [path.name for path in tmp_path.iterdir()] == [reconstruction.file]


def test_every_entry_is_under_its_name_has_a_file_of_its_own_and_can_be_computed() -> None:
    assert [(name, evaluation.file) for name, evaluation in EVALUATIONS.items()] == [
        (evaluation.name, f"{evaluation.name}.json") for evaluation in EVALUATIONS.values()
    ]
    assert all(callable(imported(evaluation.compute)) for evaluation in EVALUATIONS.values())


@pytest.mark.parametrize("room", [1.0, 0.0])
def test_a_baseline_is_encoded_once_for_the_saes_of_its_seed(
    study: Study, room: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_statistics, "KEPT_PAIRS", room)
    layer = LayerBench(study.plan, 2, study.workspace)
    scores = ProbeScores(model={}, sae=None)
    benches = [
        Bench(layer, planned, read_sae(study.workspace.folder(planned.artefact)), scores) for planned in study.plan.saes
    ]
    rows = sum(len(x_BD) for x_BD in layer.rows)
    encoded = encoded_rows(monkeypatch)
    counted: list[Any] = []
    blocks = pair_statistics.pair_blocks
    monkeypatch.setattr(pair_statistics, "pair_blocks", lambda *given: counted.append(given) or blocks(*given))
    found = [imported(EVALUATIONS["interference"].compute)(on) for on in benches]
    assert sum(encoded) == (len(benches) + 1) * rows
    assert len(counted) == len(benches) + (1 if room else len(benches))
    assert found == [
        json.loads((study.workspace.folder(planned.evaluation) / "interference.json").read_text())
        for planned in study.plan.saes
    ]
