"""What a report follows from: it is written again when one of these changes."""

from pathlib import Path

import pytest
from small_study import Study

from pipeline.report.current import made_of
from pipeline.study.experiment import Experiment
from pipeline.study.plan import make_plan

OWN = """
[arms.mine]
question = "And with more sparsity?"
l1 = 0.05
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("A study small enough for a test.", "Another one."),
        ("And with more sparsity?", "And if fewer latents fire?"),
        ("l1 = 0.05", 'l1 = 0.05\nfrom = "magnitude"\ncontrast.by = "direction"'),  # the same recipe, compared with another
    ],
)
def test_other_words_or_arms_are_another_report(study: Study, small_toml: Path, old: str, new: str) -> None:
    small_toml.write_text(small_toml.read_text().replace('"full", "magnitude"', '"full", "mine"') + OWN)
    before = made_of(make_plan(Experiment.load(str(small_toml))), study.workspace)
    assert made_of(make_plan(Experiment.load(str(small_toml))), study.workspace) == before
    text = small_toml.read_text()
    assert old in text
    small_toml.write_text(text.replace(old, new))
    assert made_of(make_plan(Experiment.load(str(small_toml))), study.workspace) != before
