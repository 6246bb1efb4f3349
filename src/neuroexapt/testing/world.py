"""A model with all that a user hangs on it, to be edited: optimizer, hooks, a frozen part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.capture.restore import restored
from neuroexapt.capture.run import opened
from neuroexapt.couple import AxisMap
from neuroexapt.guard.verify import WithoutChance
from neuroexapt.testing.models import Row

_RATE = 1e-3


class Counter:
    """A forward hook that counts its calls; a class of its own, so that it pickles."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *seen: object) -> None:
        self.calls += 1


@dataclass
class World:
    """A model in the middle of its training.

    The first parameter is frozen and not in the optimizer, the others are in two groups (with
    and without weight decay) of an Adam that has made two steps; convolutions are channels-last;
    every module counts its calls, and every trained parameter the gradients it gets.
    """

    row: Row
    axes: AxisMap
    dtype: torch.dtype
    model: nn.Module
    optimizer: torch.optim.Optimizer
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    calls: dict[str, Counter] = field(default_factory=dict)
    gradients: dict[str, list[torch.Size]] = field(default_factory=dict)

    def outputs(self, model: nn.Module | None = None) -> dict[bool, list[Tensor]]:
        """Outputs in evaluation and in training mode, random operators at their mean."""
        model = model or self.model
        modes = [trace.training for trace in self.axes.traces]
        return {mode: _forward(model, self.args, self.kwargs, mode) for mode in modes}

    def train(self, steps: int) -> list[float]:
        """Steps of the optimizer on the example; the losses before each."""
        self.model.train(any(trace.training for trace in self.axes.traces))
        losses = []
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            for _ in range(steps):
                self.optimizer.zero_grad()
                loss = self.row.loss(self.model(*self.args, **self.kwargs))
                loss.backward()
                self.optimizer.step()
                losses.append(loss.item())
        return losses


def _forward(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], training: bool
) -> list[Tensor]:
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    chance = WithoutChance()  # type: ignore[no-untyped-call]
    with restored(model, training), torch.no_grad(), chance:
        result = model(*args, **kwargs)
    for buffer, old in buffers:
        buffer.copy_(old)
    leaves = [leaf for leaf in opened(result) if isinstance(leaf, Tensor)]
    return [leaf.detach() for leaf in leaves if leaf.is_floating_point()]


def world(row: Row, axes: AxisMap, dtype: torch.dtype = torch.float32) -> World:
    """A fresh model in the middle of its training; the same at every call."""
    try:
        made = _begun(row, axes, dtype, torch.channels_last)
    except RuntimeError:  # a `view` in the forward may ask for contiguous images
        made = _begun(row, axes, dtype, torch.contiguous_format)
    for path, module in made.model.named_modules():
        made.calls[path] = Counter()
        module.register_forward_hook(made.calls[path])
    for name, parameter in made.model.named_parameters():
        if parameter.requires_grad:
            made.gradients[name] = []
            parameter.register_post_accumulate_grad_hook(_Shapes(made.gradients[name]))
    return made


def _begun(row: Row, axes: AxisMap, dtype: torch.dtype, memory: torch.memory_format) -> World:
    model = row.build(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory)
    parameters = list(model.parameters())
    if len(parameters) > 2:
        parameters[0].requires_grad_(False)
    trained = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.01},
        {"params": [p for p in trained if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=_RATE)
    made = World(row, axes, dtype, model, optimizer, *row.inputs(dtype))
    made.train(2)
    return made


class _Shapes:
    """Writes down the shape of each gradient a parameter gets."""

    def __init__(self, seen: list[torch.Size]) -> None:
        self.seen = seen

    def __call__(self, parameter: Tensor) -> None:
        grad = parameter.grad
        self.seen.append(torch.Size() if grad is None else grad.shape)
