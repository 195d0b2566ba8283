"""Geometry from the weights alone, against another way of computing it, and its artefact of its own."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_study import Study

from pipeline.artefacts.workspace import Workspace
from pipeline.evaluate.bench import Bench
from pipeline.evaluate.evaluation import evaluate, unmeasured
from pipeline.evaluate.geometry import compute
from pipeline.report.collect import collect
from pipeline.sae.finished import open_sae
from pipeline.sae.sae import SAE
from pipeline.study.evaluations import EVALUATIONS


class Alone:
    """All that geometry may read of a Bench."""

    def __init__(self, sae: SAE):
        self.sae = sae


def of(W_dec_FD: torch.Tensor, W_enc_FD: torch.Tensor) -> dict[str, object]:
    sae = SAE(
        W_enc_DF=W_enc_FD.T, b_enc_F=torch.zeros(len(W_dec_FD)), W_dec_FD=W_dec_FD, b_dec_D=torch.zeros(W_dec_FD.shape[1])
    )
    bench: Bench = Alone(sae)  # pyright: ignore[reportAssignmentType]
    return json.loads(json.dumps(compute(bench), allow_nan=False))


def test_it_is_what_numpy_finds() -> None:
    generator = torch.Generator().manual_seed(0)
    W_dec_FD, W_enc_FD = (torch.randn(40, 6, generator=generator) for _ in range(2))
    W_dec_FD[7] = W_dec_FD[3] * 2.0 + 0.01  # nearly the same direction
    W_dec_FD[11] = 0  # has none
    found = of(W_dec_FD, W_enc_FD)
    there = [index for index in range(40) if index != 11]
    decoder, encoder = (W.numpy()[there].astype(np.float64) for W in (W_dec_FD, W_enc_FD))
    cosines = np.corrcoef(decoder) * 0 + (decoder @ decoder.T) / np.outer(*[np.linalg.norm(decoder, axis=1)] * 2)
    np.fill_diagonal(cosines, -1)
    nearest = cosines.max(axis=1)
    expected = {"mean": nearest.mean(), "near": (nearest >= 0.9).mean()}
    assert found["directions"] == 39
    described = found["nearest"]
    assert isinstance(described, dict)
    assert {name: described[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert described["counts"] == np.histogram(nearest, described["edges"])[0].tolist()
    assert expected["near"] >= 2 / 39
    tied = found["encoder_decoder"]
    assert isinstance(tied, dict)
    both = (decoder * encoder).sum(axis=1) / np.linalg.norm(decoder, axis=1) / np.linalg.norm(encoder, axis=1)
    assert tied["mean"] == pytest.approx(both.mean(), abs=1e-6)


def test_random_directions_are_their_own_null() -> None:
    W_FD = torch.randn(300, 16, generator=torch.Generator().manual_seed(5))
    found = of(W_FD, W_FD)
    nearest, null, tied = (found[name] for name in ("nearest", "nearest_random", "encoder_decoder"))
    assert isinstance(nearest, dict)
    assert isinstance(null, dict)
    assert isinstance(tied, dict)
    assert nearest["mean"] == pytest.approx(null["mean"], abs=0.01)
    assert tied["mean"] == pytest.approx(1)


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_directions_have_no_number(rows: int) -> None:
    W_FD = torch.zeros(4, 3)
    W_FD[:rows] = 1
    found = of(W_FD, W_FD)
    assert found["directions"] == rows
    assert found["nearest"] == found["nearest"] | {"mean": None, "counts": None}  # pyright: ignore[reportOperatorIssue]


def test_a_finished_study_gets_it_without_being_evaluated_again(study: Study, tmp_path: Path) -> None:
    """As in a workspace of a version that did not have it."""
    shutil.copytree(study.workspace.local, tmp_path / "workspace")
    workspace = Workspace(tmp_path / "workspace")
    for sae in study.plan.saes:
        shutil.rmtree(workspace.folder(sae.apart["geometry"]))
    (full,) = [sae for sae in study.plan.saes if sae.arm == "full"]
    before = workspace.fingerprint(full.evaluation.path)
    row = next(row for row in collect(study.plan, workspace).rows if row.arm == "full")
    assert row.geometry is None
    assert unmeasured(study.plan, workspace) == list(study.plan.saes)
    assert evaluate(study.plan, workspace).made == list(study.plan.saes)
    assert evaluate(study.plan, workspace).made == []
    assert workspace.fingerprint(full.evaluation.path) == before
    row = next(row for row in collect(study.plan, workspace).rows if row.arm == "full")
    assert row.geometry is not None
    assert row.at(("geometry", "nearest")) == pytest.approx(row.max_decoder_cosine, abs=1e-5)
    expected = of(
        *(getattr(open_sae(full.artefact, workspace), name) for name in ("W_dec_FD",)),
        open_sae(full.artefact, workspace).W_enc_DF.T,
    )
    file = workspace.verified(full.apart["geometry"], EVALUATIONS["geometry"].file)
    assert json.loads(file.read_text()) == expected
