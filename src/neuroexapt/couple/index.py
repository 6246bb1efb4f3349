"""Dimension expressions, frozen, and the one primitive on which every edit of a width rests."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Positions: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class Leaf:
    """An atom by name; ``size`` is its number of positions when the map was made."""

    name: str
    size: int

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Product:
    """Row-major product of its parts."""

    parts: tuple[Expr, ...]

    def __str__(self) -> str:
        return " * ".join(f"({p})" if isinstance(p, Sum) else str(p) for p in self.parts)


@dataclass(frozen=True)
class Sum:
    """Segments in order."""

    parts: tuple[Expr, ...]

    def __str__(self) -> str:
        return " + ".join(map(str, self.parts))


Expr: TypeAlias = Leaf | Product | Sum


def leaves(expr: Expr) -> Iterator[Leaf]:
    """The atoms of an expression in order, repeated as often as they occur."""
    if isinstance(expr, Leaf):
        yield expr
    else:
        for part in expr.parts:
            yield from leaves(part)


def size_of(expr: Expr, sizes: Mapping[str, int]) -> int:
    """Number of positions when the named atoms have other sizes.

    Example:
        >>> size_of(Product((Leaf("heads", 4), Leaf("d", 8))), {"heads": 3})
        24
    """
    if isinstance(expr, Leaf):
        return sizes.get(expr.name, expr.size)
    parts = [size_of(part, sizes) for part in expr.parts]
    return prod(parts) if isinstance(expr, Product) else sum(parts)


def resize_expr(expr: Expr, name: str, size: int) -> Expr:
    """The expression with one atom at another size.

    Example:
        >>> resize_expr(Product((Leaf("c", 2), Leaf("hw", 3))), "c", 5)
        Product(parts=(Leaf(name='c', size=5), Leaf(name='hw', size=3)))
    """
    if isinstance(expr, Leaf):
        return Leaf(name, size) if expr.name == name else expr
    parts = tuple(resize_expr(part, name, size) for part in expr.parts)
    return Product(parts) if isinstance(expr, Product) else Sum(parts)


def source_index(expr: Expr, positions: Mapping[str, Positions]) -> Positions:
    """For each position of the new dimension the old position, or -1 where it is new.

    Args:
        expr: what the dimension is made of.
        positions: for each atom that changes, the old position (or -1) of each new one.
            Pruning leaves positions out, growing adds -1, splitting a unit repeats one.

    Example:
        >>> index = source_index(Product((Leaf("c", 2), Leaf("hw", 3))), {"c": np.array([1, -1])})
        >>> index.tolist()
        [3, 4, 5, -1, -1, -1]
        >>> source_index(Sum((Leaf("a", 2), Leaf("b", 2))), {"a": np.array([1])}).tolist()
        [1, 2, 3]
    """
    if isinstance(expr, Leaf):
        return positions.get(expr.name, np.arange(expr.size, dtype=np.int64))
    parts = [(source_index(part, positions), size_of(part, {})) for part in expr.parts]
    if isinstance(expr, Sum):
        return _concatenated(parts)
    index, _ = parts[0]
    for inner, size in parts[1:]:
        grid = index[:, None] * size + inner[None, :]
        index = np.where((index[:, None] < 0) | (inner[None, :] < 0), -1, grid).reshape(-1)
    return index


def _concatenated(parts: list[tuple[Positions, int]]) -> Positions:
    shifted, offset = [], 0
    for index, size in parts:
        shifted.append(np.where(index < 0, -1, index + offset))
        offset += size
    return np.concatenate(shifted).astype(np.int64)


def unit_of(expr: Expr, name: str) -> Positions:
    """For each position of the dimension its position on one atom, or -1 if it is not on it.

    Example:
        >>> unit_of(Product((Leaf("c", 2), Leaf("hw", 3))), "c").tolist()
        [0, 0, 0, 1, 1, 1]
    """
    if isinstance(expr, Leaf):
        return np.arange(expr.size) if expr.name == name else np.full(expr.size, -1)
    parts = [unit_of(part, name) for part in expr.parts]
    if isinstance(expr, Sum):
        return np.concatenate(parts)
    unit = parts[0]
    for inner in parts[1:]:
        unit = np.maximum(unit[:, None], inner[None, :]).reshape(-1)
    return unit


def unit_sums(values: Tensor, expr: Expr, width: str, dim: int, units: int) -> Tensor:
    """Sums of a tensor's entries per unit of a width along one dimension; shape (units,).

    Example:
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
