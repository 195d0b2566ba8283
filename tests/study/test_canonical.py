"""Old artefacts keep their keys: a field that was added later, marked with `Before`, is hashed only at a new value."""

from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from pipeline.artefacts.identity import key_of
from pipeline.section import Before, Section
from pipeline.study.recipe import TrainConfig


class Inner(Section):
    topk: int = 3


class Old(Section):
    steps: int = 1
    inner: Inner | None = Inner()
    several: tuple[Inner, ...] = ()
    named: dict[str, Inner] = Field(default_factory=dict)


class LaterInner(Inner):
    weighted: Annotated[bool, Before(True)] = True


class Later(Section):
    """Old with fields that were added since, one of them with another default than what was before."""

    steps: int = 1
    inner: LaterInner | None = LaterInner()
    several: tuple[LaterInner, ...] = ()
    named: dict[str, LaterInner] = Field(default_factory=dict)
    activation: Annotated[str, Before("relu")] = "topk"
    penalty: Annotated[LaterInner | None, Before(None)] = None


class Unmarked(Old):
    activation: str = "relu"


inner = st.builds(Inner, topk=st.integers())
olds = st.builds(
    Old,
    steps=st.integers(),
    inner=st.none() | inner,
    several=st.lists(inner, max_size=2).map(tuple),
    named=st.dictionaries(st.text(max_size=2), inner, max_size=2),
)


@given(olds)
def test_what_could_be_declared_before_keeps_its_key(old: Old) -> None:
    later = Later.model_validate(old.model_dump() | {"activation": "relu"})
    assert key_of(later.canonical()) == key_of(old.canonical()) == key_of(old.model_dump())


@given(olds)
def test_a_new_value_is_a_new_key(old: Old) -> None:
    fields = old.model_dump()
    assert key_of(Later.model_validate(fields).canonical()) != key_of(old.canonical())
    for changed in (
        {"penalty": {"topk": 1}},
        {"inner": {"topk": 1, "weighted": False}},
        {"several": [{"topk": 1, "weighted": False}]},
        {"named": {"x": {"topk": 1, "weighted": False}}},
    ):
        fields["activation"] = "relu"
        before, after = (Later.model_validate(fields | change) for change in ({}, changed))
        assert key_of(after.canonical()) != key_of(before.canonical())


def test_a_field_that_is_added_without_the_mark_changes_every_key() -> None:
    assert key_of(Unmarked().canonical()) != key_of(Old().canonical())


def test_some_fields_or_all_but_some() -> None:
    assert Old(steps=2).canonical(only=("steps",)) == {"steps": 2}
    assert Old().canonical(without=("inner", "several", "named")) == {"steps": 1}


@pytest.mark.parametrize(("field", "before"), [("activation", "relu"), ("penalty", None)])
def test_a_recipe_s_later_fields_are_marked(field: str, before: str | None) -> None:
    assert Before(before) in TrainConfig.model_fields[field].metadata
