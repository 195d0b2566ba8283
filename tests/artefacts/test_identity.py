import json
import math
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artefacts import identity
from pipeline.artefacts.identity import KEY_LENGTH, canonical_json, fingerprint, is_sealed, key_of, sealed, sha256

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=10,
)


def test_a_key_stays_what_it_was() -> None:
    # Every artefact on every disk is named by this function: another value here orphans all of them.
    assert key_of({"b": [1, 2.5, None], "a": "é"}) == "d764fee2563d"


@given(st.dictionaries(st.text(max_size=4), values, min_size=2, max_size=5))
def test_the_order_of_keys_does_not_matter(inputs: dict[str, object]) -> None:
    turned = dict(reversed(list(inputs.items())))
    assert key_of(turned) == key_of(inputs)
    assert len(key_of(inputs)) == KEY_LENGTH


@given(values, values)
def test_different_values_have_different_texts(one: object, other: object) -> None:
    same = canonical_json(one) == canonical_json(other)
    assert same == (repr(one) == repr(other)) or one == other


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_what_json_cannot_hold_is_refused(number: float) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        key_of({"value": number})


def test_a_fingerprint_sees_names_and_contents(tmp_path: Path) -> None:
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("one")
    b.write_text("two")
    files = [("a", a), ("b", b)]
    assert fingerprint(files) == fingerprint(reversed(files))
    assert fingerprint([("a", b), ("b", a)]) != fingerprint(files)
    before = fingerprint(files)
    b.write_text("2")
    assert fingerprint(files) != before


def test_the_hash_of_a_large_file_is_remembered_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "LARGE", 5)
    hashed: list[Path] = []

    def noted(path: Path) -> str:
        hashed.append(path)
        return sha256(path.read_bytes())

    monkeypatch.setattr(identity, "sha256_file", noted)
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_text("1234")
    large.write_text("12345")

    def of_both() -> str:
        return fingerprint([("small", small), ("large", large)])

    # Just written, it could be written again within the same tick of the clock.
    first = of_both()
    assert (of_both(), hashed) == (first, [large, small] * 2)

    monkeypatch.setattr(identity, "SETTLED", -1.0)
    hashed.clear()
    assert of_both() == first
    assert of_both() == first
    assert hashed == [large, small, small]

    # Other content of the same size, and the old time put back.
    times = large.stat()
    large.write_text("54321")
    os.utime(large, ns=(times.st_atime_ns, times.st_mtime_ns))
    hashed.clear()
    assert of_both() != first
    assert large in hashed
    large.write_text("12345")
    assert of_both() == first


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(identity, "LARGE", 1)
    monkeypatch.setattr(identity, "SETTLED", -1.0)
    (tmp_path / "text").write_text("text")
    assert fingerprint([("text", tmp_path / "text")]) == fingerprint([("text", tmp_path / "text")])


@given(st.dictionaries(st.text(max_size=4), values, min_size=1, max_size=4))
def test_a_seal_tells_every_changed_record(record: dict[str, object]) -> None:
    made = json.loads(json.dumps(sealed(record)))
    assert is_sealed(made)
    assert not is_sealed(made | {"another": 1})
    assert is_sealed({name: value for name, value in made.items() if name != "seal"})  # written before seals were
