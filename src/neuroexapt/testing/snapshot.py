"""Everything an edit could change, written down so that two moments can be compared bit by bit."""

from __future__ import annotations

import random
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_HOLDERS = ("_parameters", "_buffers", "_modules")
_PLAIN = (int, float, str, bool, tuple, list, type(None))
Snapshot = dict[str, Any]


def bits(tensor: Tensor | None) -> Any:
    """Dtype, shape, strides and bytes."""
    if tensor is None:
        return None
    data = tensor.detach().contiguous().reshape(-1)
    raw = data.view(torch.uint8) if data.numel() else data
    shape = tuple(tensor.shape), tuple(tensor.stride()) if tensor.numel() else ()
    return str(tensor.dtype), shape, raw.cpu().numpy().tobytes()


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return bits(value)
    if isinstance(value, dict):
        return {key if isinstance(key, _PLAIN) else id(key): id(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]  # as it is now: the list itself may change
    if isinstance(value, weakref.ref):
        return "weak reference", id(value())
    return value if isinstance(value, _PLAIN) else (type(value).__name__, id(value))


def _tensor(name: str, tensor: Tensor) -> Iterator[tuple[str, Any]]:
    yield f"{name}: object", (id(tensor), type(tensor), tensor.requires_grad)
    yield f"{name}: value", bits(tensor)
    yield f"{name}: gradient", bits(tensor.grad if tensor.is_leaf else None)
    yield f"{name}: attributes", dict(tensor.__dict__)
    for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        yield f"{name}: {kind}", _plain(getattr(tensor, kind, None) or {})


def _module(path: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield f"module '{path}'", (id(module), type(module))
    for holder in _HOLDERS:
        held = vars(module)[holder]
        yield f"module '{path}' {holder}", [(name, id(value)) for name, value in held.items()]
    for name, value in vars(module).items():
        if name not in _HOLDERS:
            yield f"module '{path}' {name}", _plain(value)


def _held(hook: object) -> dict[str, Any]:
    return {name: _plain(value) for name, value in getattr(hook, "__dict__", {}).items()}


def _optimizer(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Any]]:
    yield "groups", id(optimizer.param_groups)
    for kind in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        hooks = getattr(optimizer, kind, {}).items()
        yield kind, [(key, id(hook), _held(hook)) for key, hook in hooks]
    for number, group in enumerate(optimizer.param_groups):
        yield f"group {number} params", [id(p) for p in group["params"]]
        rest = {key: _plain(value) for key, value in group.items() if key != "params"}
        yield f"group {number}", (id(group), rest)
    yield "state keys", [id(p) for p in optimizer.state]
    for number, (parameter, state) in enumerate(optimizer.state.items()):
        held = {key: _plain(value) for key, value in state.items()}
        yield f"state {number}", (id(parameter), id(state), held)


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Snapshot:
    """Module tree, tensors, gradients, hooks, attributes, flags, optimizer, random states.

    Compare two of them with :func:`changes`. Objects are compared by identity: take both in one
    process, from a model that stays alive.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> before = snapshot(net)
        >>> with torch.no_grad(): old = net.bias.zero_()
        >>> changes(before, snapshot(net))
        ['bias: value']
    """
    seen: Snapshot = {}
    for path, module in model.named_modules():
        seen.update(_module(path, module))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        seen.update(_tensor(name, parameter))
    for name, buffer in model.named_buffers(remove_duplicate=False):
        seen.update(_tensor(name, buffer))
    if optimizer is not None:
        seen.update(_optimizer(optimizer))
    generator: Any = np.random.get_state()
    seen["python random"] = random.getstate()
    seen["numpy random"] = (generator[0], generator[1].tobytes(), *generator[2:])
    seen["torch random"] = bits(torch.get_rng_state())
    return seen


def changes(before: Snapshot, after: Snapshot) -> list[str]:
    """Names of everything that differs; empty when the world is as it was."""
    return [key for key in {**before, **after} if before.get(key) != after.get(key)]
