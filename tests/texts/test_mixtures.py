"""Weighted mixtures of corpora: a fixed order, shares that hold everywhere, and places that lead back."""

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.errors import BadInputError
from pipeline.study.experiment import Experiment
from pipeline.study.plan import make_plan
from pipeline.texts.corpus import corpus_texts, documents
from pipeline.texts.text_sections import MixedCorpus


def mixture(folder: Path, *parts: tuple[float, list[str]]) -> MixedCorpus:
    """Parts by weight and texts, each text in a file of its own."""
    declared: list[dict[str, Any]] = []
    for number, (weight, texts) in enumerate(parts):
        (folder / f"{number}").mkdir()
        for index, text in enumerate(texts):
            (folder / f"{number}/{index:03}.txt").write_text(text)
        declared.append({"source": "files", "paths": (f"{folder}/{number}/*.txt",), "weight": weight})
    return MixedCorpus.model_validate({"source": "mixture", "parts": tuple(declared)})


lengths = st.lists(st.integers(0, 20), min_size=1, max_size=20)


@given(lengths, lengths, st.sampled_from([0.3, 1.0, 2.0, 7.0]), st.integers(0, 40))
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_shares_hold_at_every_place_and_every_place_leads_back(
    tmp_path_factory: pytest.TempPathFactory, one: list[int], other: list[int], weight: float, number: int
) -> None:
    folder = tmp_path_factory.mktemp("parts")
    corpus = mixture(folder, (weight, ["a" * n for n in one]), (1.0, ["b" * n for n in other]))
    texts = list(corpus_texts(corpus))
    read = [0, 0]
    for text in texts:
        if text:
            read["ab".index(text[0])] += len(text)
        # One document more or less, and what empty texts count for.
        assert abs(read[0] / weight - read[1]) <= 41 * max(1, 1 / weight)
    reading = documents(corpus)
    assert list(islice(reading, number)) == texts[:number]
    assert list(documents(corpus, reading.place())) == texts[number:]


def test_a_mixture_interleaves_and_ends_with_its_first_part(tmp_path: Path) -> None:
    corpus = mixture(tmp_path, (2, ["aaa", "aaa", "aaa", "aaa", "aaa"]), (1, ["bbb", "bbb"]))
    assert list(corpus_texts(corpus)) == ["aaa", "bbb", "aaa", "aaa", "bbb", "aaa", "aaa"]


def test_a_mixture_is_declared_and_identified_by_content_and_weights(tmp_path: Path, small_toml: Path) -> None:
    def key(*weights: float) -> str:
        parts = "".join(
            f"[[corpus.parts]]\nweight = {weight}\n{part}\n" for weight, part in zip(weights, both, strict=False)
        )
        small_toml.write_text(text.replace('source = "python"', f'source = "mixture"\n{parts}'))
        return make_plan(Experiment.load(str(small_toml))).store.key

    (tmp_path / "a.txt").write_text("one")
    both = ('source = "python"', f'source = "files"\npaths = ["{tmp_path}/*.txt"]')
    text = small_toml.read_text()
    before = key(3, 1)
    assert key(3.0, 1.0) == before != key(3, 2)
    (tmp_path / "a.txt").write_text("two")
    assert key(3, 1) != before
    with pytest.raises(BadInputError, match=r"corpus\.parts\.1\.weight: input should be greater than 0, got 0"):
        key(3, 0)
    with pytest.raises(BadInputError, match=r"corpus\.parts: list should have at least 2 items"):
        key(3)
