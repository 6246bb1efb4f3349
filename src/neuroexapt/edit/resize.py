"""Tensors along a source index: the pure arithmetic under every change of width."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from neuroexapt.couple import Expr, Positions, leaves, source_index, unit_of

if TYPE_CHECKING:
    from neuroexapt.edit.patch import DimEdit, WidthStep

SPARK = 0.1  # deviation of "spark" entries: large enough to carry gradient at once


def siblings(expr: Expr, width: str, positions: Sequence[int]) -> list[tuple[int, ...]]:
    """For each new position of a dimension the old positions it stands beside.

    A kept position stands beside itself alone; a new one beside every old unit of the width
    that agrees with it in all other coordinates.

    Example:
        >>> from neuroexapt.couple import Leaf, Product
        >>> siblings(Product((Leaf("q|k", 2), Leaf("d", 2))), "d", [0, 1, -1])
        [(0,), (1,), (0, 1), (2,), (3,), (2, 3)]
    """
    given = np.asarray(positions, dtype=np.int64)
    index = source_index(expr, {width: given})
    size = next(leaf.size for leaf in leaves(expr) if leaf.name == width)
    # One source index per old unit, each with every new position standing for that unit.
    stand_ins = [source_index(expr, {width: np.where(given < 0, u, given)}) for u in range(size)]
    table = np.stack(stand_ins, axis=1)
    return [
        (int(old),) if old >= 0 else tuple(int(p) for p in row)
        for old, row in zip(index, table, strict=True)
    ]


def resized(
    tensor: Tensor,
    steps: Iterable[WidthStep],
    name: str,
    *,
    generator: torch.Generator,
    fill: str | None = None,
) -> Tensor:
    """A new tensor: old entries where the steps say, fills where they are new.

    Shape (..., n, ...) becomes (..., n', ...) for each dimension edited. The result shares no
    memory with ``tensor`` and keeps its dtype, device and memory format.

    Args:
        tensor: parameter, buffer, gradient, or optimizer state of the same shape.
        steps: the steps of a patch, in order.
        name: the parameter's name in the patch.
        generator: source of random fills, on the CPU.
        fill: overrides every fill (optimizer state: ``"zero"`` or ``"mean"``), and leaves
            scalings out.
    """
    # The deviation of the tensor as trained, not of one diluted by entries just made.
    deviation = _deviation(tensor)
    result = tensor.detach()
    for step in steps:
        if fill is None:
            result = _scaled(result, step, name)
        own = [edit for edit in step.dims if edit.tensor == name]
        # Zeros last: where a new row meets a new column, silence wins.
        for edit in sorted(own, key=lambda edit: (fill or edit.fill) == "zero"):
            result = _resized_dim(result, step, edit, fill or edit.fill, deviation, generator)
    return _in_format_of(tensor, result)


def _in_format_of(tensor: Tensor, result: Tensor) -> Tensor:
    for kind, rank in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if tensor.dim() != rank or tensor.is_contiguous():
            continue
        if tensor.is_contiguous(memory_format=kind):
            return result.clone(memory_format=kind)
    return result.clone(memory_format=torch.contiguous_format)


def _deviation(tensor: Tensor) -> float:
    if not tensor.is_floating_point() or tensor.numel() < 2 or tensor.is_meta:
        return 0.0
    return float(tensor.detach().float().std())


def _scaled(tensor: Tensor, step: WidthStep, name: str) -> Tensor:
    for scaling in step.scalings:
        if scaling.tensor != name:
            continue
        if scaling.positions is None:
            tensor = tensor * scaling.factor
        else:
            factors = tensor.new_ones(tensor.shape[scaling.dim])
            factors[list(scaling.positions)] = scaling.factor
            tensor = tensor * factors.view(-1, *[1] * (tensor.dim() - scaling.dim - 1))
    return tensor


def _resized_dim(
    tensor: Tensor,
    step: WidthStep,
    edit: DimEdit,
    fill: str,
    deviation: float,
    generator: torch.Generator,
) -> Tensor:
    index = source_index(edit.expr, {step.width: np.asarray(step.positions, dtype=np.int64)})
    taken = torch.from_numpy(np.maximum(index, 0)).to(tensor.device)
    result = tensor.index_select(edit.dim, taken)
    new = np.flatnonzero(index < 0)
    if new.size:
        beside: list[tuple[int, ...]] = [()] * len(new)
        if fill == "mean" or edit.silent:
            all_beside = siblings(edit.expr, step.width, step.positions)
            beside = [all_beside[p] for p in new]
        values = _filled(tensor, result, edit, fill, beside, deviation, generator)
        result.index_copy_(edit.dim, torch.from_numpy(new).to(tensor.device), values)
    return result


def _filled(
    old: Tensor,
    result: Tensor,
    edit: DimEdit,
    fill: str,
    beside: Sequence[tuple[int, ...]],
    deviation: float,
    generator: torch.Generator,
) -> Tensor:
    shape = list(result.shape)
    shape[edit.dim] = len(beside)
    if fill == "mean":
        values = _means(old, edit.dim, beside)
    elif fill in ("random", "spark"):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        values *= SPARK if fill == "spark" else (deviation or _he(shape))
    else:
        values = torch.full(shape, 1.0 if fill == "one" else 0.0, dtype=torch.float64)
    values = values.to(device=old.device, dtype=old.dtype)
    silent = set(edit.silent)
    quiet = [p for p, origin in enumerate(beside) if origin and origin[0] in silent]
    if quiet:
        values.index_fill_(edit.dim, torch.tensor(quiet, device=old.device), 0)
    return values


def _he(shape: Sequence[int]) -> float:
    """He et al. 2015, for a tensor whose own entries are all alike."""
    fan_in = max(1, int(np.prod(shape[1:])))
    return float(np.sqrt(2.0 / fan_in))


def _means(old: Tensor, dim: int, beside: Sequence[tuple[int, ...]]) -> Tensor:
    """The mean over each group of siblings, in double precision for an exact mean."""
    wide = old.double() if old.is_floating_point() else old.to(torch.float64)
    columns = torch.tensor(beside, device=old.device).T
    total = sum(wide.index_select(dim, column) for column in columns)
    return torch.as_tensor(total) / len(columns)


def unit_sums(values: Tensor, expr: Expr, width: str, dim: int, units: int) -> Tensor:
    """Sums of a tensor's entries per unit of a width along one dimension; shape (units,).

    Example:
        >>> from neuroexapt.couple import Leaf, Product
        >>> expr = Product((Leaf("c", 2), Leaf("hw", 2)))
        >>> unit_sums(torch.tensor([[1., 2., 3., 4.]]), expr, "c", 1, 2)
        tensor([3., 7.])
    """
    unit: Positions = unit_of(expr, width)
    other = [d for d in range(values.dim()) if d != dim]
    flat = values.sum(dim=other) if other else values
    on = torch.from_numpy(np.flatnonzero(unit >= 0)).to(values.device)
    where = torch.from_numpy(unit[unit >= 0]).to(values.device)
    return flat.new_zeros(units).index_add_(0, where, flat[on])
