"""What two seeds of an arm have in common, and when it can be told."""

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_study import SMALL, Study

from pipeline.artefacts.workspace import Workspace
from pipeline.evaluate import stability
from pipeline.evaluate.bench import Bench
from pipeline.evaluate.evaluation import evaluate, unmeasured
from pipeline.report.collect import collect
from pipeline.sae.sae import SAE
from pipeline.study.experiment import Experiment
from pipeline.study.plan import make_plan
from pipeline.train.training import train


class Seeds:
    """All that stability may read of a Bench."""

    def __init__(self, *decoders: torch.Tensor):
        self.sae, *self.siblings = (
            SAE(W_enc_DF=W.T, b_enc_F=torch.zeros(len(W)), W_dec_FD=W, b_dec_D=torch.zeros(W.shape[1])) for W in decoders
        )


def of(*decoders: torch.Tensor) -> dict[str, float | None]:
    bench: Bench = Seeds(*decoders)  # pyright: ignore[reportAssignmentType]
    return json.loads(json.dumps(stability.compute(bench), allow_nan=False))


@given(st.integers(0, 2**31))
@settings(max_examples=20)
def test_it_is_the_best_of_all_assignments(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.nn.functional.normalize(torch.randn(5, 3, generator=generator), dim=1) for _ in range(2))
    cosine = one.double() @ other.double().T
    best = max(sum(float(cosine[i, j]) for i, j in enumerate(order)) / 5 for order in itertools.permutations(range(5)))
    found = of(one * 2, other * 3)  # norms change nothing
    assert found["mcc"] == pytest.approx(best, abs=1e-6)
    assert found["mmcs"] == pytest.approx(float(cosine.max(dim=1).values.mean()), abs=1e-6)


def test_the_order_of_latents_changes_nothing_and_a_dead_one_is_left_out() -> None:
    W_FD = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
    shuffled = W_FD[torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    found = of(W_FD, shuffled, torch.cat([shuffled, torch.zeros(2, 6)]))
    assert found == {"seeds": 2, "mmcs": pytest.approx(1), "mcc": pytest.approx(1), "reason": None}
    assert of(W_FD, torch.zeros(3, 6))["mcc"] is None


def test_many_latents_are_not_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stability, "MOST_MATCHED", 11)
    W_FD = torch.randn(12, 6)
    found = of(W_FD, W_FD)
    assert found["mcc"] is None
    assert found["reason"] == "more than 11 latents are not matched one to one"
    assert found["mmcs"] == pytest.approx(1)


def test_it_waits_for_the_other_seeds_and_is_made_again_with_more_of_them(
    study: Study, small_toml: Path, tmp_path: Path
) -> None:
    small_toml.write_text(SMALL.replace("seeds = [0]", "seeds = [0, 1]").replace('"full", "magnitude"]', '"full"]'))
    experiment = Experiment.load(str(small_toml))
    plan = make_plan(experiment)
    shutil.copytree(study.workspace.local, tmp_path / "workspace")
    workspace = Workspace(tmp_path / "workspace")
    first, second = [sae for sae in plan.saes if sae.arm == "full"]
    # Of the other seed nothing is there yet, so nothing can be told, and nothing is missing of the first.
    assert unmeasured(make_plan(experiment, seeds=[0]), workspace) == []
    train(make_plan(experiment, arms=["full"]), workspace)
    assert evaluate(make_plan(experiment, arms=["full"]), workspace).made == [first, second]
    one, other = (row for row in collect(plan, workspace).rows if row.arm == "full")
    assert one.at(("stability", "mcc")) == pytest.approx(other.at(("stability", "mcc")))  # of two, both ways the same
    assert one.at(("stability", "seeds")) == 1
    more = make_plan(Experiment.load(_with_seeds(small_toml, "[0, 1, 2]")))
    key = next(sae for sae in more.saes if str(sae) == str(first)).apart["stability"].key
    assert key != first.apart["stability"].key


def _with_seeds(toml: Path, seeds: str) -> str:
    toml.write_text(toml.read_text().replace("seeds = [0, 1]", f"seeds = {seeds}"))
    return str(toml)
