"""The operations that the laws are tried with: for each, where it may be made on a model.

A new operation is a row here; ``test_table.py`` and ``test_any_order.py`` then try it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from neuroexapt import (
    AddRegularization,
    AxisMap,
    ExpandBottleneck,
    IncreaseCapacity,
    InsertAttention,
    InsertConv,
    InsertLayer,
    InsertPool,
    InsertResidual,
    Narrow,
    PruneWeights,
    RemoveLayer,
    Widen,
)
from neuroexapt.capture.masks import MASK, is_mask
from neuroexapt.edit import Edit, MakePermanent, RegrowWeights, Squeeze

Choice = Callable[[AxisMap, nn.Module], Iterable[Edit]]


def widths(axes: AxisMap) -> list[str]:
    """Names of all widths, those that most tensors have first: a stream before a hidden layer."""
    order = sorted(axes.widths.values(), key=lambda width: -len(width.appearances))
    return [width.name for width in order]


def paths(axes: AxisMap, model: nn.Module) -> list[str]:
    """Paths of all modules that run, containers and blocks first, the root last."""
    inner = [path for path in axes.modules if path]
    blocks = [path for path in inner if any(model.get_submodule(path).children())]
    return [*blocks, *(path for path in inner if path not in blocks), ""]


def at_paths(edit: Callable[..., Edit], **options: Any) -> Choice:
    """An edit at any module, blocks first."""
    return lambda axes, model: [edit(path, **options) for path in paths(axes, model)]


def at_widths(edit: Callable[..., Edit], **options: Any) -> Choice:
    """An edit of any width, streams first."""
    return lambda axes, model: [edit(name, **options) for name in widths(axes)]


def spans(axes: AxisMap, model: nn.Module) -> list[Edit]:
    """Residual connections over several modules, the farthest ends first."""
    order = [path for path in axes.modules if path]
    ends = [(first, last) for first in order for last in reversed(order) if first != last]
    return [InsertResidual(first, to=last) for first, last in ends]


def squeezed(axes: AxisMap, model: nn.Module) -> list[Edit]:
    """Any width, said to be too narrow by a reading."""
    sizes = {name: axes.widths[name].size for name in widths(axes)}
    return [ExpandBottleneck((Squeeze(name, n, n, 1e3),)) for name, n in sizes.items()]


OPERATIONS: dict[str, Choice] = {
    "Widen": at_widths(Widen, by=2),
    "Widen split": at_widths(Widen, by=2, init="split"),
    "Narrow": at_widths(Narrow, by=1),
    "PruneWeights": lambda axes, model: [PruneWeights("*", share=0.5)],
    "InsertConv": at_paths(InsertConv),
    "InsertConv identity": at_paths(InsertConv, mode="identity"),
    "InsertAttention": at_paths(InsertAttention, causal=False),
    "InsertAttention self": at_paths(InsertAttention, kind="self", heads=1, causal=True),
    "IncreaseCapacity": lambda axes, model: [IncreaseCapacity(2.0)],
    "ExpandBottleneck": squeezed,
    "InsertResidual": at_paths(InsertResidual),
    "InsertResidual over a span": spans,
    "InsertPool": at_paths(InsertPool),
    "InsertLayer": at_paths(InsertLayer),
    "InsertLayer copy": at_paths(InsertLayer, kind="copy"),
    "RemoveLayer": at_paths(RemoveLayer),
    "AddRegularization dropout": at_paths(AddRegularization, strength=0.3),
    "AddRegularization depth": at_paths(AddRegularization, kind="stochastic_depth"),
    "AddRegularization decay": lambda axes, model: [AddRegularization("", "weight_decay")],
}


def regrown(axes: AxisMap, model: nn.Module) -> list[Edit]:
    """Some weights exchanged in every masked tensor."""
    buffers = [name for name, _ in model.named_buffers() if is_mask(name)]
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(0)
    gradients = {
        name: torch.randn(parameters[name].shape, generator=generator)
        for name in (buffer.replace(MASK, "") for buffer in buffers)
        if name in parameters
    }
    return [RegrowWeights(gradients, share=0.5)]


# These change what has been pruned; on other models they are refused.
ON_MASKED: dict[str, Choice] = {
    "MakePermanent": lambda axes, model: [MakePermanent("*")],
    "RegrowWeights": regrown,
}
