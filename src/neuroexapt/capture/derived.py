"""Tensors that a model computed from its weights and keeps for evaluation.

A forward in evaluation mode may keep an attention bias, a fused kernel or a table in a plain
attribute, and the model's own ``train`` drops it, since training would make it stale. So does a
resized weight, and a run that is to show what the outputs come from must not read it either.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

_TORCH_OWN = frozenset({"_parameters", "_buffers", "_modules"})


def keepers(model: nn.Module) -> list[nn.Module]:
    """The modules that keep tensors in plain attributes and have a ``train`` of their own."""
    own = [module for module in model.modules() if type(module).train is not nn.Module.train]
    return [module for module in own if any(True for _ in _kept(module))]


def begin_training(module: nn.Module) -> None:
    """Have a module do what it does when training begins; all flags stay as they are."""
    flags = [(inner, inner.training) for inner in module.modules()]
    module.train()
    for inner, flag in flags:
        inner.training = flag


def _kept(module: nn.Module) -> Iterator[Tensor]:
    for name, value in vars(module).items():
        if name in _TORCH_OWN:
            continue
        items = list(value.values()) if isinstance(value, dict) else value
        inside = items if isinstance(items, (list, tuple)) else [items]
        yield from (item for item in inside if isinstance(item, Tensor))
