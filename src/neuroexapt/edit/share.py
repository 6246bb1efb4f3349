"""How the readers of a split unit share out what they took from one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuroexapt.couple import Expr, Leaf, Product, source_index

if TYPE_CHECKING:
    from neuroexapt.edit.patch import DimEdit, WidthStep

JITTER = 1.0  # deviation of one reader's share around the mean share, relative to it


def factors(expr: Expr, step: WidthStep) -> NDArray[np.float64]:
    """The mean share of each new position of a dimension, 1 off the width."""
    if isinstance(expr, Leaf):
        return np.asarray(step.shares) if expr.name == step.width else np.ones(expr.size)
    parts = [factors(part, step) for part in expr.parts]
    if not isinstance(expr, Product):
        return np.concatenate(parts)
    total = parts[0]
    for inner in parts[1:]:
        total = (total[:, None] * inner[None, :]).reshape(-1)
    return total


def along(values: NDArray[np.float64], tensor: Tensor, dim: int) -> Tensor:
    """Numbers along one dimension, shaped to multiply a tensor."""
    column = torch.from_numpy(np.ascontiguousarray(values)).to(tensor)
    return column.view(-1, *[1] * (tensor.dim() - dim - 1))


def shared_out(
    tensor: Tensor, step: WidthStep, edit: DimEdit, generator: torch.Generator
) -> Tensor:
    """Readers of copied units, each entry times a share; the shares of copies add up to 1.

    Every entry has shares of its own around the mean ones. With one share for all readers of a
    copy its gradients would differ from those of the other copies in length alone, to which Adam
    is blind: the copies would move together for a long time.
    """
    positions = {step.width: np.asarray(step.positions, dtype=np.int64)}
    source = torch.from_numpy(source_index(edit.expr, positions))
    count = torch.bincount(source)[source]
    noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
    front = noise.movedim(edit.dim, 0)
    sums = front.new_zeros((int(source.max()) + 1, *front.shape[1:])).index_add_(0, source, front)
    shape = (-1, *[1] * (front.dim() - 1))
    # Numbers less the mean of `count` of them have this much of their deviation left.
    left = ((count - 1).clamp(min=1) / count).double().sqrt()
    noise = ((front - sums[source] / count.view(shape)) / left.view(shape)).movedim(0, edit.dim)
    spread = along((JITTER / count).numpy(), noise, edit.dim)
    shares = along(factors(edit.expr, step), noise, edit.dim) + spread * noise
    return tensor * shares.to(tensor)
