"""Many edits in one process: nothing is left of those before."""

from __future__ import annotations

import gc
import os
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from neuroexapt import InsertConv, InsertResidual, Narrow, RemoveLayer, Widen, transaction
from neuroexapt.edit import Edit, is_branch
from neuroexapt.errors import NeuroExaptError
from neuroexapt.guard.memory import resident

# `make nightly` sets a larger number.
EDITS = int(os.environ.get("NEUROEXAPT_MANY_EDITS", "100"))
X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    """Two convolutions and a head; one edit touches some 600 kB, gradients and moments too."""
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 2),
    )


def drawn(model: nn.Module, draw: random.Random) -> Edit:
    """An edit that keeps the model small: what was inserted goes again."""
    inserted = [path for path, _ in model.named_modules() if is_branch(path.rpartition(".")[2])]
    widths = ("0", "3")
    if inserted:
        return RemoveLayer(draw.choice(inserted))
    at = draw.choice(widths)
    size = model.get_submodule(at).out_channels
    return draw.choice(
        [
            Widen(at, by=2) if size < 70 else Narrow(at, by=3),
            Narrow(at, by=1) if size > 58 else Widen(at, by=2),
            InsertConv("2", seed=draw.randrange(99)),
            InsertResidual("3", seed=draw.randrange(99)),
        ]
    )


def alive() -> int:
    """Tensors that exist in this process."""
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Tensors of a model, its gradients and its optimizer's state."""
    parameters = list(model.parameters())
    states = [value for state in optimizer.state.values() for value in state.values()]
    return (
        len(parameters)
        + len(list(model.buffers()))
        + sum(parameter.grad is not None for parameter in parameters)
        + sum(isinstance(value, Tensor) for value in states)
    )


def one(model: nn.Module, optimizer: torch.optim.Optimizer, draw: random.Random) -> bool:
    """A training step and an edit, kept or taken back."""
    optimizer.zero_grad()
    model(X).square().mean().backward()
    optimizer.step()
    tx = transaction(model, optimizer)
    try:
        tx.apply(drawn(model, draw), (X,))
    except NeuroExaptError:
        return False
    if draw.random() < 0.5:
        tx.commit()
    else:
        tx.roll_back()
    return True


def test_memory_stays_flat_over_many_edits() -> None:
    """Every tensor alive at the end is the model's or the optimizer's; resident memory is flat."""
    draw, sizes, made = random.Random(0), list[int](), 0
    before = alive()
    model = net()
    optimizer = torch.optim.Adam(model.parameters())
    for number in range(EDITS):
        made += one(model, optimizer, draw)
        if number >= EDITS // 3 and number % 5 == 0:
            gc.collect()
            sizes.append(resident() or 0)
    assert made >= 0.9 * EDITS
    assert alive() - before == held(model, optimizer)
    if not all(sizes):
        pytest.skip("the system does not tell resident memory")
    # What one edit touches is 600 kB, half of them are kept; the interpreter's own caches grow for
    # the first 200 edits or so, by 30 to 100 kB each.
    slope = float(np.polyfit(np.arange(len(sizes)) * 5, sizes, 1)[0])
    assert slope < (150_000 if EDITS < 500 else 10_000), f"{slope:.0f} bytes an edit"
