"""Identity: what is told apart, what is not, and digests that must never change unnoticed."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from s2v_flow.graph.fingerprint import fingerprint

_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
_TREES = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=10
)
_MAPS = st.dictionaries(st.text(max_size=3), _TREES, max_size=4)


def canonical(value: object) -> object:
    """Return what makes two values equal for a fingerprint, by other means than the fingerprint's own."""
    if isinstance(value, dict):
        return ("map", frozenset((key, canonical(item)) for key, item in value.items()))
    if isinstance(value, (list, tuple)):
        return ("list", tuple(canonical(item) for item in value))
    return (type(value).__name__, value)  # -0.0 == 0.0, in Python too


@pytest.mark.parametrize(
    ("preimage", "digest"),
    [
        ({}, "9663250e1709305fad47ea2564eb6e35c3c5c1d443eea3394e4cc5d77cd90309"),
        (
            {
                "kind": "k",
                "version": 1,
                "fields": {"a": [1, 1.5, True, None, "ü"], "b": {}},
                "inputs": {"x": "sha256:0"},
            },
            "36124e21da8cdcc11e2cc42944ebb5b17958ae82a5d541c9e4a55a689b46a087",
        ),
    ],
)
def test_digests_are_pinned(preimage: dict[str, Any], digest: str) -> None:
    """Everything that is stored hangs on these: another digest here makes every cache in the world cold."""
    assert fingerprint(preimage) == digest


def test_types_are_told_apart() -> None:
    """A number, a float, a truth value, a text and nothing are different, as are the containers."""
    values: list[Any] = [1, 1.0, True, "1", None, 0, 0.0, False, "", "n", [], {}, [1], {"1": 1}, [[1]], "1.0", "True"]
    assert len({fingerprint({"x": value}) for value in values}) == len(values)


def test_minus_zero_is_zero() -> None:
    """They compute the same."""
    assert fingerprint({"x": -0.0}) == fingerprint({"x": 0.0})


def test_the_smallest_differences_of_floats_count() -> None:
    """Also among denormal numbers; and text is never rounded."""
    for x in (1.0, 0.1, 5e-324, 1e308):
        assert fingerprint({"x": x}) != fingerprint({"x": math.nextafter(x, 0)})


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_has_no_identity(number: float) -> None:
    """However deep it stands."""
    with pytest.raises(ValueError, match="finite"):
        fingerprint({"x": [{"y": number}]})


@pytest.mark.parametrize("thing", [b"bytes", {1, 2}, object(), 1j])
def test_other_things_are_refused_not_guessed_at(thing: object) -> None:
    """Their type is named."""
    with pytest.raises(TypeError, match=type(thing).__name__):
        fingerprint({"x": thing})


def test_keys_are_text() -> None:
    """1 and "1" cannot be mixed up."""
    with pytest.raises(TypeError, match="keys are text"):
        fingerprint({"x": {1: 1}})  # type: ignore[dict-item]


def test_lists_and_tuples_are_alike() -> None:
    """JSON has one of them only, and entries are kept as JSON."""
    assert fingerprint({"x": (1, (2,))}) == fingerprint({"x": [1, [2]]})


@given(_MAPS)
def test_the_order_of_keys_does_not_count(value: dict[str, Any]) -> None:
    """At any depth."""

    def turned(item: Any) -> Any:
        if isinstance(item, dict):
            return {key: turned(item[key]) for key in reversed(list(item))}
        return [turned(each) for each in item] if isinstance(item, list) else item

    assert fingerprint(turned(value)) == fingerprint(value)


@given(_MAPS, _MAPS)
@example({"a": ["b", "c"]}, {"a": ["b", ["c"]]})
@example({"a": "b;s1:c"}, {"a": "b", "c": ""})
@example({"a": ["x]", "y"]}, {"a": ["x", "]y"]})
@example({"a": {"b": 1}, "c": 2}, {"a": {"b": 1, "c": 2}})
@example({"a": ["ab", "c"]}, {"a": ["a", "bc"]})
@example({"a": ["é"]}, {"a": ["e\u0301"]})
def test_equal_fingerprints_mean_equal_structures(one: dict[str, Any], other: dict[str, Any]) -> None:
    """No delimiter inside a text, and no nesting, makes two structures look alike."""
    assert (fingerprint(one) == fingerprint(other)) == (canonical(one) == canonical(other))


@given(st.lists(st.text(alphabet=":;{}[]sinlmfb0123", max_size=6), max_size=3), st.data())
def test_cutting_lists_elsewhere_gives_another_identity(parts: list[str], data: st.DataObject) -> None:
    """The same letters in other pieces, letters that look like delimiters and lengths above all."""
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=3)))
    pieces = [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    assert (fingerprint({"x": parts}) == fingerprint({"x": pieces})) == (parts == pieces)
