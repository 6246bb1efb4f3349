"""Differences between lists of layers put the later list together again, whatever changed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neuroexapt.record import changed, difference

NAMES = st.sampled_from("abcdefgh")
LISTS = st.lists(
    st.builds(lambda name, shape: {"name": name, "shape": shape}, NAMES, st.sampled_from("124")),
    unique_by=lambda layer: layer["name"],
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(LISTS, LISTS)
def test_a_difference_gives_the_later_list(before: list[Any], after: list[Any]) -> None:
    """Also where layers moved, came first or went all at once; nothing given is written on."""
    told = [dict(layer) for layer in before]
    assert changed(before, difference(before, after)) == after
    assert before == told
    assert (difference(before, after) == {}) == (before == after)


def test_only_what_differs_is_written() -> None:
    """A resized layer is one entry, an inserted one knows its place."""
    before = [{"name": name, "shape": "4"} for name in "abc"]
    after = [before[0], {"name": "n", "shape": "1"}, {"name": "c", "shape": "8"}]
    assert difference(before, after) == {
        "removed": ["b"],
        "changed": [{"name": "c", "shape": "8"}],
        "added": [{"name": "n", "shape": "1", "after": "a"}],
    }


@pytest.mark.parametrize(
    "found",
    [{"all": 3}, {"removed": 1}, {"added": [1, {}, {"name": 2}]}, {"changed": "x"}, {"y": 1}],
)
def test_senseless_parts_are_passed_over(found: dict[str, Any]) -> None:
    """A journal may come from anywhere."""
    assert changed([{"name": "a"}], found) == [{"name": "a"}]
