"""Masks on parameters: set, changed and taken away, with what the optimizer keeps."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from neuroexapt.capture.masks import MASK
from neuroexapt.edit import Masking, fitting_class
from neuroexapt.guard.ledger import Ledger, drop_item, put_item, set_class
from neuroexapt.guard.optimizer import SECOND_MOMENTS, reweigh
from neuroexapt.guard.values import set_values


def set_mask(
    ledger: Ledger,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    masking: Masking,
) -> None:
    """Zero what a mask shuts out, here and in the optimizer, and have modules read through it.

    Every module that holds the parameter gets the same mask. Taking a mask away leaves zeros.

    Raises:
        GuardError: a live graph or a weak reference forbids it.
    """
    parameter = dict(model.named_parameters(remove_duplicate=False))[masking.tensor]
    holders = _holders(model, parameter)
    old = held_mask(model, parameter)
    mask = old if masking.mask is None else _like(parameter, masking.mask)
    if mask is None:
        return
    grad = None if parameter.grad is None else parameter.grad * mask
    values = parameter.detach().masked_fill(~mask, 0)
    set_values(ledger, parameter, values, masking.tensor, grad=grad)
    if optimizer is not None:
        born = mask & ~(mask if old is None else old)
        reweigh(ledger, optimizer, parameter, partial(_masked, mask=mask, born=born))
    buffers = _masks(holders)
    for buffer in () if masking.mask is None else buffers:
        set_values(ledger, buffer, mask, masking.tensor, grad=None)
    for module, name in holders:
        if masking.mask is None:
            drop_item(ledger, module._buffers, f"{MASK}{name}")
        elif f"{MASK}{name}" not in module._buffers:
            put_item(ledger, module._buffers, f"{MASK}{name}", mask)
        set_class(ledger, module, fitting_class(module))
    ledger.note({"do": "mask", "tensor": masking.tensor, "on": masking.mask is not None})


def held_mask(model: nn.Module, tensor: Tensor) -> Tensor | None:
    """The mask a parameter has, if it has one."""
    return next(iter(_masks(_holders(model, tensor))), None)


def _holders(model: nn.Module, parameter: Tensor) -> list[tuple[nn.Module, str]]:
    return [
        (module, name)
        for module in model.modules()
        for name, held in module._parameters.items()
        if held is parameter
    ]


def _masks(holders: list[tuple[nn.Module, str]]) -> list[Tensor]:
    """Each once: tied modules share one until they are moved to another device."""
    found = [module._buffers.get(f"{MASK}{name}") for module, name in holders]
    return list({id(mask): mask for mask in found if mask is not None}.values())


def _like(parameter: Tensor, mask: Tensor) -> Tensor:
    return torch.empty_like(parameter.detach(), dtype=torch.bool).copy_(mask)


def _masked(key: str, value: Tensor, mask: Tensor, born: Tensor) -> Tensor:
    """A weight that grows again starts as any new one does: zero momentum, and the second moment
    of its siblings, as zero beside an old `step` would make its first updates too large."""
    siblings = value[mask & ~born]
    if key in SECOND_MOMENTS and siblings.numel():
        value = torch.where(born, siblings.mean(), value)
    return value * mask
