"""Put back whatever a forward may leave behind: what was only looked at stays as it was."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neuroexapt.capture.derived import begin_training, keepers
from neuroexapt.capture.interrupts import held_back

_CONTAINERS = (dict, list, set)
_DEEPEST = 4  # objects in lists in objects of a module: further in nobody keeps state
_LONGEST = 1000
_PLAIN = {bool, int, float, str, type(None), tuple, nn.Parameter}  # most of what a module holds
_OPAQUE = (Tensor, nn.Module, type, types.ModuleType)


def _spaces(model: nn.Module) -> list[Any]:
    """Every container of the modules' attributes, and of plain objects that they hold."""
    found: dict[int, Any] = {}
    edge: list[Any] = [vars(module) for module in model.modules()]
    for _ in range(_DEEPEST):
        fresh = [space for space in edge if id(space) not in found]
        found.update((id(space), space) for space in fresh)
        edge = [inner for space in fresh for inner in _inside(space)]
    return list(found.values())


def _inside(space: Any) -> Iterator[Any]:
    if not space or len(space) > _LONGEST:
        return
    for value in list(space.values() if isinstance(space, dict) else space):
        kind = type(value)
        if kind in _PLAIN:
            continue
        if kind in _CONTAINERS or isinstance(value, OrderedDict):
            yield value
        elif hasattr(value, "__dict__") and not isinstance(value, _OPAQUE) and not callable(value):
            yield vars(value)


def _put_back(space: Any, contents: Any) -> None:
    """The same container with the contents it had."""
    if _same(space, contents):
        return
    if isinstance(space, list):
        space[:] = contents
    else:
        space.clear()
        space.update(contents)


def _same(value: Any, contents: Any) -> bool:
    """Identity of every item: tensors have no truth value to compare by."""
    if len(value) != len(contents):
        return False
    if not value:
        return True
    if isinstance(value, dict):
        return all(contents.get(k, contents) is item for k, item in value.items())
    if isinstance(value, list):
        return all(a is b for a, b in zip(value, contents, strict=True))
    return {id(item) for item in value} == {id(item) for item in contents}


def _caches(model: nn.Module) -> list[Any]:
    """Functions under ``functools.lru_cache`` beside the classes of the model's modules."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    kinds = {kind for kind in kinds if not kind.__module__.startswith(("torch.", "builtins"))}
    spaces: list[Mapping[str, Any]] = [vars(kind) for kind in kinds]
    names = {kind.__module__ for kind in kinds}
    spaces += [vars(sys.modules[name]) for name in names if name in sys.modules]
    return [
        cache
        for space in spaces
        for held in list(space.values())
        for value in [getattr(held, "__func__", held)]  # inside a static or class method
        for cache in (value, *_closed_over(value))
        if isinstance(cache, functools._lru_cache_wrapper)
    ]


def _closed_over(value: Any) -> Iterator[Any]:
    """What a function keeps in its closure: a decorator may hide the cache there."""
    cells = value.__closure__ if isinstance(value, types.FunctionType) else None
    for cell in cells or ():
        with contextlib.suppress(ValueError):  # an empty cell
            yield cell.cell_contents


def _clear(caches: list[Any]) -> None:
    for cache in caches:
        cache.cache_clear()


def _cpu_fork() -> contextlib.AbstractContextManager[None]:
    return torch.random.fork_rng(devices=())


@contextlib.contextmanager
def restored(model: nn.Module, training: bool) -> Iterator[None]:
    """Set every training flag; put everything back that a forward may leave behind.

    Module attributes and tables, what plain objects and configs of the modules hold (values
    cached by a forward, lists it appends to), training flags, random states, the attention switch.
    Ctrl-C waits, as in :func:`held_back`.
    """
    with held_back():
        yield from _restored(model, training)


def _restored(model: nn.Module, training: bool) -> Iterator[None]:
    held = [(space, space.copy()) for space in _spaces(model)]
    states = random.getstate(), np.random.get_state()
    devices = range(torch.accelerator.device_count()) if torch.accelerator.is_available() else ()
    accelerator = torch.accelerator.current_accelerator()
    kind = accelerator.type if accelerator is not None else "cpu"
    fast_path = torch.backends.mha.get_fastpath_enabled()
    # Fake tensors log each operator that fails, with its stack; our caller gets the exception.
    silent = logging.getLogger("torch._subclasses.fake_tensor")
    disabled = silent.disabled
    caches = _caches(model)
    try:
        # A function that remembers tensors would hand those of another run to this one.
        _clear(caches)
        silent.disabled = True
        # The fused inference kernel of nn.MultiheadAttention hides the projections inside it.
        torch.backends.mha.set_fastpath_enabled(False)
        for module in keepers(model):
            begin_training(module)
        for module in model.modules():
            vars(module)["training"] = training
        fork = torch.random.fork_rng(devices, device_type=kind) if devices else _cpu_fork()
        # A look without gradients draws warnings that no run of the user's would.
        with fork, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _clear(caches)
        for space, contents in held:
            _put_back(space, contents)
        silent.disabled = disabled
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.backends.mha.set_fastpath_enabled(fast_path)
