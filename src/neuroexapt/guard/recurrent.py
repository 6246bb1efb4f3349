"""Recurrent modules know their weights by weak reference, which forbids swapping them.

``nn.RNNBase`` compares the references with its parameters at every forward, to notice weights
that others put in their place. They are taken away before the weights are resized, and made
anew from the same parameter objects afterwards.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from functools import partial

from torch import Tensor, nn

from neuroexapt.guard.ledger import Ledger


def recurrent_owners(model: nn.Module, tensors: Iterable[Tensor]) -> list[nn.RNNBase]:
    """The recurrent modules that refer to any of these tensors."""
    wanted = {id(tensor) for tensor in tensors}
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.RNNBase)
        and wanted & {id(weight) for weight in module._flat_weights}
    ]


def release(ledger: Ledger, modules: Iterable[nn.RNNBase]) -> None:
    """Take the weak references away: before any of the weights is swapped."""
    for module in modules:
        ledger.do(partial(_forget, module), partial(_refer, module))


def renew(ledger: Ledger, modules: Iterable[nn.RNNBase]) -> None:
    """Refer to the weights again: after the weights and the module's sizes are written."""
    for module in modules:
        ledger.do(partial(_refer, module), partial(_forget, module))


def _forget(module: nn.RNNBase) -> None:
    # In place: whoever else holds the list would otherwise keep the references alive.
    module._flat_weight_refs.clear()


def _refer(module: nn.RNNBase) -> None:
    module._flat_weight_refs[:] = [
        None if weight is None else weakref.ref(weight) for weight in module._flat_weights
    ]
    # cuDNN wants all weights in one piece of memory; elsewhere this does nothing. A weight that
    # is computed (weight norm) is of the last forward until the next one, and may not fit.
    if all(isinstance(weight, nn.Parameter) for weight in module._flat_weights):
        module.flatten_parameters()
