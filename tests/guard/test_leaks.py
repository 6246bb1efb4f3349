"""Memory that outlives an edit is found, and what holds it is named."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from neuroexapt import Narrow, Widen, apply, transaction
from neuroexapt.guard.leaks import LeakWatch

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def world() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A net with gradients and Adam's state."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(X).sum().backward()
    optimizer.step()
    return model, optimizer


KEPT: dict[str, tuple[Callable[[torch.Tensor], Any], str]] = {
    "list": (lambda weight: [weight.data], "a list of 1"),
    "view": (lambda weight: (weight.detach()[1:],), "a tuple of 1"),
    "attribute": (lambda weight: SimpleNamespace(best=weight.data), "'best', attribute of"),
    "dict": (lambda weight: {"old": weight.data}, "'old', item of a dict"),
}


@pytest.mark.parametrize("way", KEPT)
def test_the_holder_is_named(way: str) -> None:
    """The tensor, its size, and where the user keeps it; once let go it is no leak any more."""
    model, optimizer = world()
    keep, said = KEPT[way]
    watch, kept = LeakWatch(model, optimizer), keep(model.get_parameter("0.weight"))
    apply(model, Widen("0", by=2), (X,), optimizer=optimizer)
    (leak,) = watch.found()
    assert (leak.tensor, leak.bytes) == ("0.weight", 8 * 4 * 4)
    assert any(said in holder for holder in leak.holders), leak
    del kept
    assert not watch.found()


def test_a_local_variable_is_named_with_its_function() -> None:
    """State of the optimizer too."""
    model, optimizer = world()
    mine = optimizer.state[model.get_parameter("2.weight")]["exp_avg"]
    watch = LeakWatch(model, optimizer)
    apply(model, Narrow("0", by=2), (X,), optimizer=optimizer)
    (leak,) = watch.found()
    assert leak.tensor == "state exp_avg of 2.weight"
    assert any("variable mine of test_a_local_variable" in holder for holder in leak.holders)
    del mine


def test_a_graph_that_holds_a_parameter_is_said_to() -> None:
    """A clone that is not detached: nothing in Python refers to what it came from."""
    model, optimizer = world()
    copies = [parameter.clone() for parameter in model.parameters()]
    watch = LeakWatch(model, optimizer)
    apply(model, Widen("0", by=2), (X,), optimizer=optimizer)
    leaks = watch.found()
    assert {"0.weight", "0.bias"} <= {leak.tensor for leak in leaks}
    assert all("an autograd graph" in leak.holders[0] for leak in leaks)
    del copies
    assert not watch.found()


@pytest.mark.parametrize("kept", [True, False])
def test_an_edit_leaks_nothing(kept: bool) -> None:
    """Whether it is kept or taken back."""
    model, optimizer = world()
    watch = LeakWatch(model, optimizer)
    tx = transaction(model, optimizer)
    tx.apply(Widen("0", by=2), (X,))
    assert watch.found()  # until then the way back holds what was
    if kept:
        tx.commit()
    else:
        tx.roll_back()
    assert not watch.found()
