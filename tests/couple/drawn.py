"""Drawn arguments, and the call of an operator on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.couple.brute_force import RealCall

DRAW = torch.Generator()


class W(Tensor):
    """Marks a tensor made of weights."""


def x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=DRAW)


def w(*shape: int) -> Tensor:
    return x(*shape).as_subclass(W)


def positive(*shape: int) -> Tensor:
    return 0.1 + 0.8 * torch.rand(shape, dtype=torch.float64, generator=DRAW)


def whole(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, generator=DRAW)


def mask(*shape: int) -> Tensor:
    return x(*shape) > 0


def definite(batch: int, size: int) -> Tensor:
    """Symmetric positive definite matrices."""
    roots = x(batch, size, size)
    return roots @ roots.mT + torch.eye(size, dtype=torch.float64)


def call(op: str, *args: Any, **kwargs: Any) -> RealCall:
    """The call of ``"name"`` or ``"name.overload"`` of the aten operators."""
    name, _, overload = op.partition(".")
    func = getattr(getattr(torch.ops.aten, name), overload or "default")
    flat = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)]
    weights = {id(a): a.as_subclass(Tensor) for a in flat if isinstance(a, W)}

    def plain(value: Any) -> Any:
        return weights.get(id(value), value)

    return RealCall(
        func,
        tuple(map(plain, args)),
        {key: plain(value) for key, value in kwargs.items()},
        tuple(weights.values()),
    )
