"""The zoo as the laws see it: mapped once, calmed, compared, trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt import AxisMap, map_axes
from tests import zoo

NAMES = [row.name for row in zoo.ZOO]


@cache
def mapped(name: str, dtype: torch.dtype = torch.float32) -> AxisMap:
    """The axis map of a zoo model, made once a process."""
    return map_axes(zoo.build(name, dtype=dtype), zoo.example(name, dtype=dtype))


def calm(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A zoo model without dropout, so that training mode can be compared too."""
    model = zoo.build(name, dtype=dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def outputs(model: nn.Module, args: tuple[Any, ...], training: bool = False) -> Tensor:
    """The flattened outputs in one mode, with a fixed seed; buffers and flags are put back."""
    flags = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(0)
        result = zoo.flat(model.train(training)(*args))
        for buffer, old in buffers:
            buffer.copy_(old)
    for module, flag in flags:
        module.training = flag
    return result


def difference(before: Tensor, after: Tensor) -> float:
    """The largest difference beside the largest entry; shapes must agree."""
    assert before.shape == after.shape
    assert after.isfinite().all()
    return float((before - after).abs().max() / before.abs().max())


def train(
    model: nn.Module,
    args: tuple[Any, ...],
    optimizer: torch.optim.Optimizer,
    steps: int,
    after_backward: Callable[[], None] = lambda: None,
) -> list[float]:
    """Some steps on one batch; the losses before each."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = zoo.loss(model, args)
        loss.backward()
        after_backward()
        optimizer.step()
        losses.append(loss.item())
    return losses
