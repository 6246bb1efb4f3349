"""An oracle for couplings: silence a unit where the map says it is read, take it out, compare.

If the map ties wrong positions together, either the unit was not silent or another one is
taken out, and the outputs differ. This is done here by plain indexing, without the rooms that
edit models, so that an error of theirs is not mistaken for one of the map.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neuroexapt.couple import AxisMap, Width, leaves, size_of, source_index, unit_of

TOLERANCE = 1e-5
# Operators after which a silent unit still counts in what the others become.
MIXING = {
    "layer_norm",
    "layer_norm_nd",
    "mean_square",
    "group_norm",
    "softmax",
    "mean",
    "sum",
    "var",
}


def named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under every name; tied tensors appear several times."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


def silenced(model: nn.Module, axes: AxisMap, width: Width, unit: int) -> nn.Module:
    """A copy in which nothing reads the unit: zeros in every consumer's slices of it.

    A dot product reads nothing by weights of its own: its left operand is made zero.
    """
    model = copy.deepcopy(model)
    tensors = named(model)
    for place in width.appearances:
        if "consumer" in place.roles:
            units = unit_of(axes.tensors[place.tensor][place.dim], width.name)
            at = torch.from_numpy(np.flatnonzero(units == unit))
            with torch.no_grad():
                tensors[place.tensor].index_fill_(place.dim, at, 0)
    for side in (side for mixer in width.mixers for side in mixer.sides[0]):
        units = unit_of(axes.tensors[side.tensor][side.dim], width.name)
        at = torch.tensor([p for p in side.positions if units[p] == unit], dtype=torch.long)
        with torch.no_grad():
            tensors[side.tensor].index_fill_(side.dim, at, 0)
    return model


def without(model: nn.Module, axes: AxisMap, width: Width, unit: int) -> nn.Module:
    """A copy with the unit taken out of every tensor and every number that repeats the width."""
    kept = np.array([u for u in range(width.size) if u != unit], dtype=np.int64)
    model = copy.deepcopy(model)
    made: dict[int, Tensor] = {}
    for name, tensor in named(model).items():
        made.setdefault(id(tensor), _taken(tensor, axes, name, width, kept))
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        held = module._parameters if leaf in module._parameters else module._buffers
        held[leaf] = made[id(tensor)]
    for bound in axes.attributes:
        if any(leaf.name == width.name for expr in bound.exprs for leaf in leaves(expr)):
            values = tuple(size_of(expr, {width.name: len(kept)}) for expr in bound.exprs)
            owner = model.get_submodule(bound.module)
            setattr(owner, bound.name, values if bound.is_tuple else values[0])
    return model


def _taken(tensor: Tensor, axes: AxisMap, name: str, width: Width, kept: np.ndarray) -> Tensor:
    result = tensor.detach()
    for dim, expr in enumerate(axes.tensors[name]):
        index = source_index(expr, {width.name: kept})
        result = result.index_select(dim, torch.from_numpy(index))
    return nn.Parameter(result) if isinstance(tensor, nn.Parameter) else result


def outputs(model: nn.Module, args: tuple[Any, ...]) -> list[Tensor]:
    """What the model gives in evaluation mode, as a flat list."""
    with torch.no_grad():
        result = model.eval()(*args)
    if isinstance(result, Tensor):
        return [result]
    return list(result.values() if isinstance(result, Mapping) else result)


def worst_difference(
    model: nn.Module, args: tuple[Any, ...], axes: AxisMap, width: Width, unit: int
) -> float:
    """How far the outputs move when a silent unit is taken out; relative to their size."""
    quiet = silenced(model, axes, width, unit)
    before = outputs(quiet, args)
    after = outputs(without(quiet, axes, width, unit), args)
    assert [tuple(t.shape) for t in before] == [tuple(t.shape) for t in after]
    return max(
        float((a - b).abs().max() / b.abs().max().clamp_min(1e-3))
        for a, b in zip(after, before, strict=True)
    )
