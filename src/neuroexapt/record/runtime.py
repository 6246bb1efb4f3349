"""The functions of a generated file; see :mod:`neuroexapt.record.standalone`, which quotes them.

Everything behind the line ``# --- the functions`` is copied as it stands, so it names nothing but
torch and what the file holds besides.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.edit.graft import _ROLES, HOLD, PASS, _first, _sequential_members, _with

# --- the functions


def fill(model: nn.Module, weights: str | dict[str, Tensor]) -> nn.Module:
    """Give an evolved model its values: every parameter and buffer, by name."""
    held = torch.load(weights, weights_only=True) if isinstance(weights, str) else weights
    named: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    named.update(model.named_buffers(remove_duplicate=False))
    if held.keys() != named.keys():
        raise KeyError(f"other tensors: {sorted(held.keys() ^ named.keys())[:5]}")
    for name, tensor in named.items():
        if tensor.shape != held[name].shape:
            raise ValueError(f"{name}: {tuple(held[name].shape)} for {tuple(tensor.shape)}")
        tensor.data = held[name].to(tensor.device)
    return model


def is_branch(name: str) -> bool:
    """Whether a child was added by an edit."""
    return name.startswith(_ROLES)


def _resize(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    held = {**module._buffers, **module._parameters}[last]
    assert held is not None
    held.data = torch.zeros(shape, dtype=held.dtype, device=held.device)


def _set(model: nn.Module, path: str, name: str, value: Any) -> None:
    """An attribute of a module, or an item of a config, list or dictionary that it holds."""
    steps = name.split(".")
    chain: list[Any] = [model.get_submodule(path)]
    for step in steps[:-1]:
        chain.append(_item(chain[-1], step))
    for holder, step in zip(reversed(chain), reversed(steps), strict=True):
        if isinstance(holder, tuple):
            at = int(step)
            value = type(holder)((*holder[:at], value, *holder[at + 1 :]))
        elif isinstance(holder, list):
            holder[int(step)] = value
            return
        else:
            contents = holder if isinstance(holder, dict) else vars(holder)
            if step in contents or not isinstance(holder, nn.Module):
                contents[step] = value
            else:
                setattr(holder, step, value)
            return


def _item(holder: Any, step: str) -> Any:
    if isinstance(holder, (list, tuple)):
        return holder[int(step)]
    return holder[step] if isinstance(holder, dict) else getattr(holder, step)


def _insert(
    model: nn.Module,
    path: str,
    child: str,
    branch: nn.Module,
    beside: str | None,
    dtype: torch.dtype | None,
) -> None:
    module = model.get_submodule(path)
    near = dict(model.named_parameters(remove_duplicate=False)).get(beside or "")
    if near is not None:
        branch = branch.to(device=near.device, dtype=dtype or near.dtype)
    module.add_module(child, branch)
    _graft(module)


def _remove(model: nn.Module, path: str, passage: nn.Module) -> None:
    module = model.get_submodule(path)
    for held in (module._parameters, module._buffers, module._modules):
        for name in [name for name in held if not is_branch(name)]:
            del held[name]
    module.add_module(PASS, passage)
    _graft(module)


def _drop(model: nn.Module, path: str) -> None:
    parent, _, name = path.rpartition(".")
    del model.get_submodule(parent)._modules[name]


def _give(model: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    beside = next(p for p in module._parameters.values() if p is not None)
    module._parameters[last] = nn.Parameter(beside.new_zeros(shape))


def _last_hold(model: nn.Module, path: str) -> Any:
    children = model.get_submodule(path)._modules.items()
    return [child for name, child in children if name.startswith(HOLD)][-1]


def _twin(model: nn.Module, path: str, numbers: Sequence[tuple[str, str, int]]) -> nn.Module:
    """A copy of a block; what modules outside of it hold too is shared."""
    block = model.get_submodule(path)
    inside = list(block.modules())
    outside = [module for module in model.modules() if not any(module is m for m in inside)]
    memo: dict[int, Any] = {id(module): module for module in outside}
    others = {id(value) for module in outside for value in vars(module).values()}
    for module in inside:
        for value in vars(module).values():
            if id(value) in others and not isinstance(value, (Tensor, nn.Module)):
                memo[id(value)] = value
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    twin = copy.deepcopy(block, memo)
    for name in [name for name in twin._modules if is_branch(name)]:
        del twin._modules[name]
    for inner, name, value in numbers:
        vars(twin.get_submodule(inner))[name] = value
    return twin


def _graft(module: nn.Module) -> None:
    """Have what was added to a module take part in its forward; its class stays its own."""
    module.__class__ = _grafted(getattr(type(module), "_nx_original", type(module)))


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _grafted(kind: type[nn.Module]) -> type[nn.Module]:
    if kind in _CLASSES:
        return _CLASSES[kind]

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        added = [(n, m) for n, m in self._modules.items() if m is not None and is_branch(n)]
        for name, child in added:
            if name.startswith(HOLD):
                child(_first(args, kwargs))
        passage = self._modules.get(PASS)
        out = (
            passage(*args, **kwargs) if passage is not None else kind.forward(self, *args, **kwargs)
        )
        for name, child in added:
            out = _with(out, name, child, args, kwargs)
        return out

    members: dict[str, Any] = {"forward": functools.wraps(kind.forward)(forward)}
    members.update(_nx_original=kind, __reduce_ex__=_reduce, __module__=kind.__module__)
    if issubclass(kind, nn.Sequential):
        members.update(_sequential_members(kind))
    _CLASSES[kind] = type(f"Grafted{kind.__name__}", (kind,), members)
    return _CLASSES[kind]


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    kind: Any = type(self)
    state = getattr(self, "__getstate__", lambda: self.__dict__)()  # on object since 3.11
    return _bare, (kind._nx_original,), state


def _bare(kind: type[nn.Module]) -> nn.Module:
    grafted = _grafted(kind)
    return grafted.__new__(grafted)
