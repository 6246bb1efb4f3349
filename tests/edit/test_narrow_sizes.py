"""How many units stay: rounding, minimum widths, kernels that demand a multiple."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

from neuroexapt import Narrow, apply, map_axes
from neuroexapt.capture.run import named_tensors
from neuroexapt.errors import EditError

X = torch.randn(4, 6)


def net(*hidden: int) -> nn.Sequential:
    sizes, layers = (6, *hidden, 2), list[nn.Module]()
    for one, two in itertools.pairwise(sizes):
        layers += [nn.Linear(one, two), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


SIZES: list[tuple[tuple[int, ...], dict[str, Any], tuple[int, ...]]] = [
    ((20,), {"at": "0", "by": 5}, (15,)),
    ((20,), {"at": "0", "by": 5, "multiple_of": 8}, (16,)),
    ((20,), {"at": "0", "by": 0.5, "multiple_of": 8}, (16,)),
    ((20,), {"at": "0", "by": 0.7, "multiple_of": 4}, (8,)),
    ((20,), {"at": "0", "to": 16, "multiple_of": 8}, (16,)),
    ((20,), {"at": "0", "by": 0.7, "minimum": 5}, (6,)),
    ((20, 9, 4), {"at": "*", "by": 0.5, "minimum": 5}, (10, 5, 4)),
    ((20, 9, 4), {"at": "*", "by": 0.5, "multiple_of": 4}, (12, 8, 4)),
    ((20, 9, 4), {"at": "*", "by": 0.5, "multiple_of": 4, "minimum": 5}, (12, 8, 4)),
    ((20, 9, 4), {"at": "*", "to": 6, "multiple_of": 4}, (8, 8, 4)),
    ((20, 9, 4), {"at": "*", "to": 3, "minimum": 4}, (4, 4, 4)),
    ((20, 1), {"at": "*", "by": 3}, (17, 1)),
]


@pytest.mark.parametrize(("hidden", "edit", "expected"), SIZES, ids=str)
def test_the_new_sizes(
    hidden: tuple[int, ...], edit: dict[str, Any], expected: tuple[int, ...]
) -> None:
    """Rounded up to the multiple, never below the minimum, never grown; those that fit stay."""
    model = net(*hidden)
    apply(model, Narrow(**edit), (X,))
    found = [layer.out_features for layer in model[:-1] if isinstance(layer, nn.Linear)]
    assert tuple(found) == expected
    assert model(X).shape == (4, 2)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"at": "0", "to": 9, "multiple_of": 8}, "a multiple of 8"),
    ({"at": "0", "to": 3, "minimum": 4}, "at least 4"),
    ({"at": "0", "by": 18, "minimum": 4}, "at least 4"),
    ({"at": "0", "by": 2, "multiple_of": 16}, "fewer than the present size"),
    ({"at": "*", "by": 2, "minimum": 50}, "more than 50 units"),
    ({"at": "*", "to": 0}, "at least 1"),
    ({"at": "0", "by": 2, "multiple_of": 2.5}, "whole number"),
    ({"at": "0", "by": 2, "minimum": 0}, "at least 1"),
    ({"at": "0", "by": 2, "score": "L2"}, "one of l2, l1, random"),
]


@pytest.mark.parametrize(("edit", "word"), REFUSED, ids=str)
def test_sizes_that_cannot_be(edit: dict[str, Any], word: str) -> None:
    """Each is refused beforehand, with what would do."""
    model = net(20)
    with pytest.raises(EditError, match=word):
        Narrow(**edit).plan(map_axes(model, (X,)), named_tensors(model))
