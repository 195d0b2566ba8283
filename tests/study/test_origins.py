"""Sources of SAEs: what a plan makes of them, and what it refuses. Bringing one in: tests/test_docs.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.errors import BadInputError
from pipeline.study.experiment import Experiment
from pipeline.study.origins import ORIGINS, Basis, Origin
from pipeline.study.plan import make_plan
from pipeline.study.planned import PlannedSAE


def add(monkeypatch: pytest.MonkeyPatch, *names: str, content: str = "x") -> None:
    def planned(basis: Basis) -> Iterator[PlannedSAE]:
        return (basis.outside("others", name, layer=layer, content=content) for layer in (1, 2) for name in names)

    monkeypatch.setitem(ORIGINS, "others", Origin(plan=planned))


@pytest.fixture
def experiment(small_toml: Path) -> Experiment:
    small_toml.write_text(small_toml.read_text().replace("layers = [2]", "layers = [1, 2]").replace("= [0]", "= [1, 3]"))
    return Experiment.load(str(small_toml))


def test_saes_of_others_stand_beside_the_arms_of_their_layer(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = make_plan(experiment)
    add(monkeypatch, "theirs")
    plan = make_plan(experiment)
    assert plan.to_train == list(alone.saes)
    assert [str(sae) for sae in plan.from_outside] == ["theirs seed 0 layer 1", "theirs seed 0 layer 2"]
    assert [(sae.layer, sae.arm) for sae in plan.saes][5:8] == [(1, "magnitude"), (1, "theirs"), (2, "baseline")]
    assert all(sae.baseline is None for sae in plan.from_outside)
    assert {sae.artefact.path for sae in plan.from_outside} <= {artefact.path for artefact in plan.trained}


def test_a_part_of_the_study_names_them_like_an_arm(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, "theirs", "hers")
    assert [str(sae) for sae in make_plan(experiment, arms=["hers", "full"], seeds=[0, 3], layers=[2]).saes] == [
        "hers seed 0 layer 2", "full seed 3 layer 2"
    ]  # fmt: skip
    with pytest.raises(BadInputError, match=r"arm 'his' is not part of the study, which has \['baseline', .*'hers'\]"):
        make_plan(experiment, arms=["his"])


def test_an_evaluation_belongs_to_weights_and_to_rows(small_toml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keys(content: str, tokens: str) -> tuple[str, str]:
        add(monkeypatch, "theirs", content=content)
        small_toml.write_text(small_toml.read_text().replace("20_000", tokens))
        sae = make_plan(Experiment.load(str(small_toml))).from_outside[0]
        return sae.artefact.key, sae.evaluation.key

    first, other_weights, other_rows = keys("x", "20_000"), keys("y", "20_000"), keys("y", "16_000")
    assert first[0] != other_weights[0] == other_rows[0]
    assert len({first[1], other_weights[1], other_rows[1]}) == 3


def test_two_saes_of_one_name_are_refused(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch, "theirs", "theirs")
    with pytest.raises(BadInputError, match="two SAEs are called theirs seed 0 layer 1, from 'others' and 'others'"):
        make_plan(experiment)
    add(monkeypatch, "Theirs/x")
    with pytest.raises(BadInputError, match="others: name 'Theirs/x' must be at most 20 lower-case letters"):
        make_plan(experiment)
