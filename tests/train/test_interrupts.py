"""Ctrl-C at any moment: the model is the old one or the new one, and training goes on."""

from __future__ import annotations

import copy
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tests.train.test_loop import Run
from torch import Tensor, nn

from neuroexapt import Evolver, Widen, apply
from neuroexapt.testing import changes, snapshot

X = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
# `make nightly` sets a larger number.
MOMENTS = int(os.environ.get("NEUROEXAPT_INTERRUPTS", "25"))


def interrupted(after: float, action: Callable[[], object]) -> bool:
    """Press Ctrl-C some seconds from now, unless the action is over by then; tells whether."""
    timer = threading.Timer(after, os.kill, (os.getpid(), signal.SIGINT))
    try:
        timer.start()
        action()
        timer.cancel()
        timer.join()
        time.sleep(0.001)
    except KeyboardInterrupt:
        return True
    return False


def world() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A net with batch norm and Adam's state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters())
    model(X).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def values(model: nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Weights, buffers and state, to be compared between two models."""
    state = [
        {key: value.tolist() if isinstance(value, Tensor) else value for key, value in held.items()}
        for held in optimizer.state.values()
    ]
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}, state


def test_an_edit_interrupted_at_any_moment_is_made_or_not() -> None:
    """To the bit, with flags, hooks and random states; and it can be made afterwards."""
    draw, hits = random.Random(0), 0
    model, optimizer = world()
    for _ in range(2):  # the first one warms caches up
        twin, twins = copy.deepcopy((model, optimizer))
        started = time.perf_counter()
        apply(twin, Widen("0", by=2), (X,), optimizer=twins)
    whole, new = time.perf_counter() - started, values(twin, twins)
    for _ in range(MOMENTS):
        before = snapshot(model, optimizer)
        edit = partial(apply, model, Widen("0", by=2), (X,), optimizer=optimizer)
        hits += interrupted(draw.random() * whole, edit)
        if changes(before, snapshot(model, optimizer)):
            assert values(model, optimizer) == new
            model, optimizer = world()
    assert hits > MOMENTS // 4
    apply(model, Widen("0", by=2), (X,), optimizer=optimizer)
    assert values(model, optimizer) == new


def epochs(run: Run, seconds: float) -> None:
    """Ends of epochs, one after the other: most of the time a change is being made."""
    assert run.evolver is not None
    started = time.perf_counter()
    while time.perf_counter() - started < seconds:
        run.optimizer.zero_grad()
        run.evolver.end_epoch()


def test_an_evolving_run_interrupted_at_any_moment_goes_on() -> None:
    """After each Ctrl-C: one architecture, an optimizer that fits it, a loss that is a number."""
    draw, run = random.Random(1), Run()
    run.epochs(1)
    evolver = run.evolver
    assert isinstance(evolver, Evolver)
    hits = 0
    for _ in range(MOMENTS // 2):
        hits += interrupted(draw.random() * 0.3, partial(epochs, run, 0.3))
        run.optimizer.zero_grad()
        trained = [p for group in run.optimizer.param_groups for p in group["params"]]
        assert {id(p) for p in trained} == {id(p) for p in run.model.parameters()}
        for parameter, state in run.optimizer.state.items():
            shapes = {v.shape for v in state.values() if isinstance(v, Tensor) and v.dim()}
            assert shapes <= {parameter.shape}
        assert (evolver.trial is None) == (evolver.state.trial is None)
        assert all(module.training == run.model.training for module in run.model.modules())
        run.epochs(1)
    assert hits > MOMENTS // 8
    losses = [event["holdout_loss"] for event in run.events if event["event"] == "epoch"]
    assert all(loss is not None and loss == loss for loss in losses)
