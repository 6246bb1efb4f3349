"""Weights that a pre-forward hook computes (torch.nn.utils.weight_norm, spectral_norm, prune).

Such a module keeps the computed weight as a plain attribute with the graph that made it, from
construction on, and that graph would forbid to swap what the weight is computed from. The next
forward computes it anew, so the graph of the old one can go (for good: a roll back leaves the same
values without it).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from neuroexapt.guard.ledger import Ledger


def drop_graphs(ledger: Ledger, model: nn.Module) -> None:
    """Detach every weight that a hook computes before each forward."""
    for module, name in _computed(model):
        held: dict[str, Any] = vars(module)
        old = held[name]
        if isinstance(old, Tensor) and old.grad_fn is not None:
            # Not kept for the way back: it is the graph on it that has to go.
            write = partial(held.__setitem__, name, old.detach())
            ledger.do(write, write)


def _computed(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in model.modules():
        for hook in module._forward_pre_hooks.values():
            name = ""
            if isinstance(hook, (WeightNorm, SpectralNorm)):
                name = hook.name
            elif isinstance(hook, BasePruningMethod):
                name = hook._tensor_name
            if name in vars(module):
                yield module, name
