"""Tensors along a source index: the pure arithmetic under every change of width."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuroexapt.couple import Expr, Leaf, Positions, Product, leaves, source_index, unit_of
from neuroexapt.edit.share import along, factors, shared_out

if TYPE_CHECKING:
    from neuroexapt.edit.patch import DimEdit, Refold, WidthStep

SPARK = 0.1  # deviation of "spark" entries: large enough to carry gradient at once


def siblings(
    expr: Expr, width: str, positions: Sequence[int], along: Sequence[str] = ()
) -> list[tuple[int, ...]]:
    """For each new position of a dimension the old positions it stands beside.

    A kept position stands beside itself alone; a new one beside every old position that agrees
    with it in all coordinates but the width's, or but those of all atoms in ``along``.

    Example:
        >>> from neuroexapt.couple import Leaf, Product
        >>> siblings(Product((Leaf("q|k", 2), Leaf("d", 2))), "d", [0, 1, -1])
        [(0,), (1,), (0, 1), (2,), (3,), (2, 3)]
        >>> siblings(Product((Leaf("heads", 1), Leaf("d", 2))), "heads", [0, -1], ["heads", "d"])
        [(0,), (1,), (0, 1), (0, 1)]
    """
    given = np.asarray(positions, dtype=np.int64)
    index = source_index(expr, {width: given})
    # A new position stands for the first old unit: what it agrees with shows there.
    standing = source_index(expr, {width: np.maximum(given, 0)})
    fixed = dict.fromkeys(leaf.name for leaf in leaves(expr) if leaf.name not in (along or [width]))
    coordinates = [_segment(expr), *(unit_of(expr, name) for name in fixed)]
    keys = list(zip(*(coordinate.tolist() for coordinate in coordinates), strict=True))
    groups: dict[tuple[int, ...], list[int]] = {}
    on = _on(expr, along or [width])
    for position in np.flatnonzero(on).tolist():
        groups.setdefault(keys[position], []).append(position)
    return [
        (int(old),) if old >= 0 else tuple(groups[keys[stand_in]])
        for old, stand_in in zip(index.tolist(), standing.tolist(), strict=True)
    ]


def _segment(expr: Expr) -> Positions:
    """For each position a number that tells the segments of all sums apart."""
    if isinstance(expr, Leaf):
        return np.zeros(expr.size, dtype=np.int64)
    parts = [_segment(part) for part in expr.parts]
    if isinstance(expr, Product):
        total = parts[0]
        for inner in parts[1:]:
            total = (total[:, None] * (inner.max(initial=0) + 1) + inner[None, :]).reshape(-1)
        return total
    offsets = np.cumsum([0, *(part.max(initial=0) + 1 for part in parts)])
    return np.concatenate([part + at for part, at in zip(parts, offsets, strict=False)])


def _on(expr: Expr, names: Sequence[str]) -> NDArray[np.bool_]:
    """Which positions of a dimension lie on one of these atoms."""
    on: NDArray[np.bool_] = np.any([unit_of(expr, name) >= 0 for name in names], axis=0)
    return on


def resized(
    tensor: Tensor,
    steps: Iterable[WidthStep],
    name: str,
    *,
    generator: torch.Generator,
    fill: str | None = None,
    power: int = 0,
) -> Tensor:
    """A new tensor: old entries where the steps say, fills where they are new.

    Shape (..., n, ...) becomes (..., n', ...) for each dimension edited. The result shares no
    memory with ``tensor`` and keeps its dtype, device and memory format.

    Args:
        tensor: parameter, buffer, gradient, or optimizer state of the same shape.
        steps: the steps of a patch, in order.
        name: the parameter's name in the patch.
        generator: source of random fills, on the CPU.
        fill: overrides every fill and all given values: for a gradient or optimizer state
            (``"zero"`` or ``"mean"``).
        power: with ``fill``, the power of the gradient that the entries are made of. Where the
            steps scale a parameter or split a unit, they follow by the chain rule.
    """
    # The deviation of the tensor as trained, not of one diluted by entries just made.
    deviation = _deviation(tensor)
    result = tensor.detach()
    for step in steps:
        if fill is None or power:
            result = _scaled(result, step if fill is None else _eased(step, power), name)
        own = [edit for edit in step.dims if edit.tensor == name]
        # Zeros last: where a new row meets a new column, silence wins.
        for edit in sorted(own, key=lambda edit: (fill or edit.fill) == "zero"):
            change = edit if fill is None else replace(edit, fill=fill, values=None)
            result = _resized_dim(result, step, change, deviation, generator)
            if step.shares and edit.shared and fill is None:
                result = shared_out(result, step, edit, generator)
            elif step.shares and not edit.shared and power:
                result = result * along(factors(edit.expr, step) ** power, result, edit.dim)
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
            tensor = tensor * scaling.factor + scaling.offset * (scaling.factor - 1)
        else:
            factors = tensor.new_ones(tensor.shape[scaling.dim])
            factors[list(scaling.positions)] = scaling.factor
            tensor = tensor * factors.view(-1, *[1] * (tensor.dim() - scaling.dim - 1))
    return tensor


def _eased(step: WidthStep, power: int) -> WidthStep:
    """Gradients of a scaled parameter go the other way, for the function is kept."""
    scalings = [replace(s, factor=s.factor**-power, offset=0.0) for s in step.scalings]
    return replace(step, scalings=tuple(scalings))


def _resized_dim(
    tensor: Tensor, step: WidthStep, edit: DimEdit, deviation: float, generator: torch.Generator
) -> Tensor:
    index = source_index(edit.expr, {step.width: np.asarray(step.positions, dtype=np.int64)})
    taken = torch.from_numpy(np.maximum(index, 0)).to(tensor.device)
    result = tensor.index_select(edit.dim, taken)
    new = np.flatnonzero(index < 0)
    if new.size:
        beside: list[tuple[int, ...]] = [()] * len(new)
        if edit.fill in ("mean", "balanced") or edit.silent:
            all_beside = siblings(edit.expr, step.width, step.positions, edit.along)
            beside = [all_beside[p] for p in new]
        values = _filled(tensor, result, edit, beside, deviation, generator)
        result.index_copy_(edit.dim, torch.from_numpy(new).to(tensor.device), values)
    return result


def _filled(
    old: Tensor,
    result: Tensor,
    edit: DimEdit,
    beside: Sequence[tuple[int, ...]],
    deviation: float,
    generator: torch.Generator,
) -> Tensor:
    shape, fill = list(result.shape), edit.fill
    shape[edit.dim] = len(beside)
    if edit.values is not None:
        values = edit.values.reshape(shape)
    elif fill == "mean":
        values = _means(old, edit.dim, beside)
    elif fill in ("random", "spark", "balanced"):
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        values *= SPARK if fill == "spark" else (deviation or _he(shape))
        if fill == "balanced":
            values = _balanced(values, edit.dim, beside)
    else:
        values = torch.full(shape, 1.0 if fill == "one" else 0.0, dtype=torch.float64)
    values = values.to(device=old.device, dtype=old.dtype)
    silent = set(edit.silent)
    quiet = [p for p, origin in enumerate(beside) if origin and origin[0] in silent]
    if quiet:
        values.index_fill_(edit.dim, torch.tensor(quiet, device=old.device), 0)
    return values


def _balanced(values: Tensor, dim: int, beside: Sequence[tuple[int, ...]]) -> Tensor:
    """Take the mean off the new entries that stand beside the same old ones."""
    for group in dict.fromkeys(beside):
        at = torch.tensor([place for place, other in enumerate(beside) if other == group])
        part = values.index_select(dim, at)
        values.index_copy_(dim, at, part - part.mean(dim, keepdim=True))
    return values


def _he(shape: Sequence[int]) -> float:
    """He et al. 2015, for a tensor whose own entries are all alike."""
    fan_in = max(1, int(np.prod(shape[1:])))
    return float(np.sqrt(2.0 / fan_in))


def _means(old: Tensor, dim: int, beside: Sequence[tuple[int, ...]]) -> Tensor:
    """The mean over each group of siblings, in double precision for an exact mean."""
    wide = old.double() if old.is_floating_point() else old.to(torch.float64)
    groups = {
        group: wide.index_select(dim, torch.tensor(group, device=old.device)).mean(dim)
        for group in dict.fromkeys(beside)
    }
    return torch.stack([groups[group] for group in beside], dim)


def folded(tensor: Tensor, refold: Refold, *, mean: bool = False) -> Tensor:
    """A new tensor whose positions are sums (or means) over groups of the old ones.

    Shape (..., n, ...) becomes (..., number of groups, ...); dtype and device are kept.
    """
    where = torch.full((tensor.shape[refold.dim],), -1, dtype=torch.int64)
    for new, group in enumerate(refold.groups):
        where[list(group)] = new
    taken = torch.nonzero(where >= 0).flatten()
    wide = tensor.detach().double().index_select(refold.dim, taken.to(tensor.device))
    shape = list(tensor.shape)
    shape[refold.dim] = len(refold.groups)
    result = wide.new_zeros(shape).index_add_(refold.dim, where[taken].to(tensor.device), wide)
    if mean:
        sizes = wide.new_tensor([max(1, len(group)) for group in refold.groups])
        result /= sizes.view(-1, *[1] * (tensor.dim() - refold.dim - 1))
    return result.to(tensor.dtype)
