"""What forbids an edit is found before the first write, and named; what does not is let go."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neuroexapt import InsertResidual, PruneWeights, Widen, apply, map_axes
from neuroexapt.edit import Edit
from neuroexapt.errors import GuardError
from neuroexapt.guard.holders import check_swappable
from neuroexapt.testing import changes, snapshot

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A model that is the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return make()


def mlp() -> nn.Module:
    """Two layers."""
    return seeded(lambda: nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))


def gradients(model: nn.Module) -> list[Tensor | None]:
    """Of every parameter."""
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def expected(model: nn.Module) -> list[Tensor | None]:
    """The gradients of a step that nothing comes in between."""
    model.zero_grad()
    model(X).square().mean().backward()
    wanted = gradients(model)
    model.zero_grad()
    return wanted


def refused_and_whole(model: nn.Module, edit: Edit) -> str:
    """An edit between forward and backward is refused; nothing is touched, the backward right."""
    wanted = expected(model)
    waiting = model(X).square().mean()
    before = snapshot(model)
    with pytest.raises(GuardError) as caught:
        apply(model, edit, (X,))
    assert not changes(before, snapshot(model))
    waiting.backward()
    for mine, theirs in zip(gradients(model), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    apply(model, edit, (X,))  # the loss has run its backward: it may be held on
    assert waiting.isfinite()
    return str(caught.value)


@pytest.mark.parametrize("place", ["0", "2"])
def test_a_graph_that_keeps_no_weights_is_seen(place: str) -> None:
    """A first layer's weight is not kept for the backward; its gradient node waits all the same."""
    told = refused_and_whole(mlp(), PruneWeights(place, share=0.5))
    assert f"{place}.weight: got a live autograd graph" in told
    assert "variable waiting of refused_and_whole" in told


@pytest.mark.parametrize("place", ["0", "2"])
def test_a_graph_that_holds_a_mask_is_seen(place: str) -> None:
    """Before the weight beside it is touched."""
    model = mlp()
    apply(model, PruneWeights(place, share=0.25), (X,))
    assert "a live autograd graph" in refused_and_whole(model, PruneWeights(place, share=0.5))


class Checkpointed(nn.Module):
    """The middle runs again during the backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, self.last, self.reentrant = nn.Linear(4, 4), nn.Linear(2, 2), reentrant
        self.middle = mlp()

    def forward(self, x: Tensor) -> Tensor:
        inside = checkpoint(self.middle, self.first(x), use_reentrant=self.reentrant)
        return torch.as_tensor(self.last(inside))


INSIDE: list[Edit] = [
    Widen("middle.0", by=3),
    InsertResidual("middle.0"),
    PruneWeights("middle.0", share=0.5),
]


@pytest.mark.parametrize("edit", INSIDE, ids=lambda edit: type(edit).__name__)
@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_that_waits_is_seen(reentrant: bool, edit: Edit) -> None:
    """It would run the changed model: without a word, or failing in the user's backward."""
    told = refused_and_whole(seeded(lambda: Checkpointed(reentrant)), edit)
    assert "a checkpointed forward of Sequential that waits for its backward" in told


def test_only_tensors_in_the_way_count() -> None:
    """Another model's loss may wait, unless it waits for a checkpoint, which may run anything."""
    model, other = mlp(), mlp()
    waiting = other(X).sum()
    apply(model, Widen("0", by=2), (X,))
    waiting.backward()


def test_a_copy_that_was_not_detached_is_a_note() -> None:
    """Weights cloned or joined into a vector forbid nothing; a penalty on them does."""
    model = mlp()
    notes = [p.clone() for p in model.parameters()]
    notes.append(nn.utils.parameters_to_vector([p.double() for p in model.parameters()]))
    apply(model, Widen("0", by=2), (X,))
    penalty = nn.utils.parameters_to_vector([p.clone() for p in model.parameters()]).sum()
    with pytest.raises(GuardError, match="variable penalty"):
        apply(model, Widen("0", by=2), (X,))
    penalty.backward()


# --- weak references -----------------------------------------------------------------------------


class Listed(nn.Module):
    """Reads a weight from a plain list, which a trace follows by weak reference."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 8)
        self.plain = [self.body.weight]

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.plain[0])


@pytest.fixture
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collection")
def test_what_a_trace_leaves_behind_is_let_go() -> None:
    """Garbage that watches a weight is no obstacle."""
    model = Listed()
    map_axes(model, (X,))
    assert weakref.getweakrefs(model.body.weight)
    check_swappable(dict(model.named_parameters()))
    assert not weakref.getweakrefs(model.body.weight)


@pytest.mark.usefixtures("_no_collection")
def test_a_loss_that_nobody_can_reach_is_let_go() -> None:
    """A cycle of garbage holds its graph until somebody collects it."""
    model = mlp()
    cycle: list[Any] = [model(X).sum()]
    cycle.append(cycle)
    del cycle
    apply(model, Widen("0", by=2), (X,))


@pytest.mark.parametrize("alive", [True, False])
def test_an_exported_model_can_be_edited(alive: bool) -> None:
    """torch.export leaves notes on every parameter for good; a program that lives on goes along."""
    model = mlp()
    program: Any = torch.export.export(model, (X,))
    assert weakref.getweakrefs(model.get_parameter("0.weight"))
    if not alive:
        program = None
    apply(model, Widen("0", by=2), (X,))
    assert model.get_parameter("0.weight").shape == (10, 4)
    if alive:
        torch.testing.assert_close(program.module()(X), model(X))


class Watcher:
    """Somebody who watches a weight."""

    def __init__(self, weight: Tensor) -> None:
        self.watched = weakref.ref(weight)


def test_who_watches_is_named() -> None:
    """By variable, attribute or kind of mapping."""
    model = mlp()
    by_attribute = Watcher(model.get_parameter("0.weight"))
    with pytest.raises(GuardError, match="'watched', attribute of Watcher"):
        apply(model, Widen("0", by=2), (X,))
    del by_attribute
    by_key = weakref.WeakKeyDictionary({model.get_parameter("0.weight"): 1})
    with pytest.raises(GuardError, match="a key of a WeakKeyDictionary"):
        apply(model, Widen("0", by=2), (X,))
    by_key.clear()
    apply(model, Widen("0", by=2), (X,))


def test_a_view_is_seen_before_the_swap() -> None:
    """It would see the old memory; nothing is touched, and without it the edit is made."""
    model = mlp()
    with torch.no_grad():
        flat = model.get_parameter("2.weight").view(-1)
    before = snapshot(model)
    with pytest.raises(GuardError, match=r"2\.weight: got a view"):
        apply(model, Widen("0", by=2), (X,))
    assert not changes(before, snapshot(model))
    assert flat.shape == (16,)
    del flat
    apply(model, Widen("0", by=2), (X,))
