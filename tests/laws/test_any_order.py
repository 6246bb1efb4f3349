"""Any order of operations, with training in between: the laws after each, and all of it undone.

``NEUROEXAPT_SEQUENCES`` sets how many sequences are drawn for each model; drawn anew at each run
if it is set, the same ones otherwise.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from torch import Tensor, nn
from torch.nn import functional as F

from neuroexapt import AxisMap, map_axes
from neuroexapt.capture.run import named_tensors
from neuroexapt.errors import EditError
from neuroexapt.guard.trial import Trial
from neuroexapt.testing import Row, changes, default_models, laws, snapshot
from neuroexapt.testing.world import World, world
from tests.laws.operations import ON_MASKED, OPERATIONS

SEQUENCES = int(os.environ.get("NEUROEXAPT_SEQUENCES", "0"))
LONGEST = 12
EVERY = OPERATIONS | ON_MASKED


class Branches(nn.Module):
    """Concatenated branches, a depthwise convolution, a group norm, a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.left = nn.Conv2d(4, 3, 1)
        self.right = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 5, 1))
        self.mix = nn.Conv2d(8, 6, 1)
        self.norm = nn.GroupNorm(3, 6)
        self.gate = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.norm(self.mix(torch.cat([self.left(x), self.right(x)], 1)))
        pooled = x.mean((2, 3))
        return self.head(pooled * torch.sigmoid(self.gate(pooled)))


@cache
def rows() -> dict[str, Row]:
    """The small models of the library, and one more."""
    image = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return {row.name: row for row in (*default_models(), Row("branches", Branches, (image,)))}


@cache
def mapped(name: str) -> AxisMap:
    """The map of a model as it is built."""
    return map_axes(rows()[name].build(), rows()[name].args)


_MAPS: dict[Any, AxisMap] = {}


def structure(name: str, model: nn.Module) -> Any:
    """All that a map depends on: modules, plain attributes, shapes."""
    plain = (int, float, str, tuple)
    modules = tuple(
        (path, type(module), *((k, v) for k, v in vars(module).items() if isinstance(v, plain)))
        for path, module in model.named_modules()
    )
    return name, modules, tuple((n, tuple(t.shape)) for n, t in named_tensors(model).items())


class AnyOrder(RuleBasedStateMachine):
    """A model in training on which edits are made one after the other."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.world: World = world(rows()[name], mapped(name))
        self.world.optimizer.zero_grad()
        self.start = snapshot(self.world.model, self.world.optimizer)
        self.trial = Trial(self.world.model, self.world.optimizer)
        self.begun = False

    @rule(operation=st.sampled_from(sorted(EVERY)), pick=st.integers(0, 11))
    def edit(self, operation: str, pick: int) -> None:
        """Made with every law kept, or refused with nothing changed."""
        here = self.world
        key = structure(here.row.name, here.model)
        if key not in _MAPS:
            _MAPS[key] = map_axes(here.model, here.args)
        here.axes = _MAPS[key]
        candidates = list(EVERY[operation](here.axes, here.model))
        edit = candidates[pick % len(candidates)]
        old, was = laws.before(here), snapshot(here.model, here.optimizer)
        refusal: EditError | None = None
        try:
            patch = edit.plan(here.axes, named_tensors(here.model))
            self.trial.apply(edit, here.args, axes=here.axes)
        except EditError as error:
            refusal = error
        if refusal is not None:
            assert not changes(was, snapshot(here.model, here.optimizer)), refusal
            return
        self.begun = True
        laws.check_promise(here, edit, patch, old)
        laws.check_survivors(here, edit, patch, old)
        laws.check_optimizer(here, edit, old)

    @precondition(lambda self: self.begun)
    @rule()
    def train(self) -> None:
        """A step of training moves the loss and leaves it finite."""
        (loss,) = self.world.train(1)
        assert torch.tensor(loss).isfinite()
        self.world.optimizer.zero_grad()

    def teardown(self) -> None:
        """Everything is undone, training too, bit for bit."""
        self.trial.roll_back()
        left = changes(self.start, snapshot(self.world.model, self.world.optimizer))
        # A state that has trained comes back as a copy: its values are compared, not its object.
        assert not [name for name in left if not name.startswith("state ")], left
        end = snapshot(self.world.model, self.world.optimizer)
        for name in left:
            assert (self.start[name][0], self.start[name][2]) == (end[name][0], end[name][2]), name


@pytest.mark.parametrize("name", sorted(rows()))
def test_any_order(name: str) -> None:
    """Sequences of up to twelve operations, training in between, and back."""
    run_state_machine_as_test(
        lambda: AnyOrder(name),
        settings=settings(
            max_examples=SEQUENCES or 60,
            stateful_step_count=LONGEST,
            derandomize=not SEQUENCES,
            deadline=None,
        ),
    )
