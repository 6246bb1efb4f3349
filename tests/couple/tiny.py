"""Tiny models around an operator, from which the rows of the table of operators are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


class Between(nn.Module):
    """A function between two layers, so that the width of the first flows through it."""

    def __init__(self, first: nn.Module, op: Callable[..., Tensor], last: nn.Module) -> None:
        super().__init__()
        self.first, self.op, self.last = first, op, last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.op(self.first(x)))


class Weighted(nn.Module):
    """A function of the input and of bare parameters of given shapes."""

    def __init__(self, op: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.op = op
        self.weights = nn.ParameterList(nn.Parameter(torch.randn(shape)) for shape in shapes)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x, *self.weights)


class Heads(nn.Module):
    """Attention by hand: one fused projection, heads as an attribute."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.heads, self.attend = 3, attend
        self.qkv, self.out = nn.Linear(5, 3 * 3 * 4), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (
            part.view(batch, tokens, self.heads, -1).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        return self.out(self.attend(q, k, v).transpose(1, 2).reshape(batch, tokens, -1))


def by_hand(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) / k.shape[-1] ** 0.5, -1) @ v


@dataclass(frozen=True)
class Row:
    """A tiny model around an operator.

    ``widths``: the sizes of all widths that must be found; ``pinned``: a text that the reason
    of some pin must have (before the place in brackets, which quotes the row itself).
    """

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    widths: tuple[int, ...]
    pinned: str = "contract with its caller"


def vector(op: Callable[..., Tensor], width: int = 6, after: int | None = None) -> Any:
    """(4, 5) -> width -> the operator -> 3 outputs."""
    return lambda: Between(nn.Linear(5, width), op, nn.Linear(after or width, 3))


def image(op: Callable[..., Tensor], width: int = 6, after: int | None = None) -> Any:
    """(2, 3, 8, 8) -> width channels -> the operator -> 3 channels."""
    return lambda: Between(nn.Conv2d(3, width, 1), op, nn.Conv2d(after or width, 3, 1))


def conv(*layers: nn.Module) -> Any:
    return lambda: nn.Sequential(*layers)


VECTOR, TOKENS, IMAGE = (4, 5), (4, 7, 5), (2, 3, 8, 8)
FLAT = torch.tensor([2, 0, 1, 5])
