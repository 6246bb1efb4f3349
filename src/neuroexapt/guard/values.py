"""New values for a tensor that keeps its shape, its object and its kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neuroexapt.guard.ledger import Ledger, swap


def alike(tensor: Tensor, data: Tensor) -> Tensor:
    """A parameter if ``tensor`` is one, trained if it is trained."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(data, requires_grad=tensor.requires_grad)
    return data


def set_values(
    ledger: Ledger, tensor: Tensor, values: Tensor, name: str, *, grad: Tensor | None
) -> None:
    """Give a tensor other values and another gradient; strides, dtype and device stay.

    Raises:
        GuardError: a live graph or a weak reference forbids it.
    """
    new = alike(tensor, torch.empty_like(tensor).copy_(values))
    new.grad = grad
    swap(ledger, tensor, new, name)
