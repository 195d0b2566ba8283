"""Identity does not drift: artefacts made by earlier versions of this package keep their names.

`tests/frozen/` holds copies of the four experiments as they were when the list of keys was written. A key may leave the list
only together with a format number (`study/plan.py`, `study/origins.py`) that was raised because bytes changed. A new option
changes none: a field that is marked with `section.Before` is hashed only at a new value.
"""

import json
from pathlib import Path

import pytest

from pipeline.study.arms import ARMS
from pipeline.study.experiment import Experiment
from pipeline.study.plan import make_plan
from pipeline.texts import python

FROZEN = Path(__file__).parents[1] / "frozen"
KEYS: dict[str, list[str]] = json.loads((FROZEN / "keys.json").read_text())
ARMS_THEN = (
    "baseline", "full", "magnitude", "no-contrast", "unweighted", "coef-0.05", "coef-0.2", "topk-0.05", "topk-0.2",
    "warmup-2000", "warmup-500", "row", "mutual", "orthogonal", "unit-norm", "l0-matched", "literal",
)  # fmt: skip


@pytest.mark.parametrize("name", KEYS)
def test_every_key_is_as_it_was(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Python's own sources differ from release to release; all else that is hashed is the same everywhere.
    monkeypatch.setattr(python, "fingerprint", lambda: "0" * 64)
    experiment = Experiment.load(str(FROZEN / f"{name}.toml"))
    study = experiment.study.model_copy(update={"arms": ARMS_THEN, "seeds": experiment.study.seeds[:1]})
    plans = [make_plan(experiment), make_plan(experiment.model_copy(update={"study": study}))]
    artefacts = [artefact for plan in plans for artefact in (*plan.extracted, *plan.trained, *plan.evaluated)]
    apart = {artefact.path for plan in plans for sae in plan.saes for artefact in sae.apart.values()}
    assert sorted({artefact.path for artefact in artefacts} - apart) == KEYS[name]


def test_no_arm_has_left() -> None:
    assert set(ARMS_THEN) <= set(ARMS)
