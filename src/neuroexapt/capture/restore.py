"""Put back whatever a forward may leave behind: what was only looked at stays as it was."""

from __future__ import annotations

import contextlib
import functools
import logging
import random
import sys
import types
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from neuroexapt.capture.attributes import is_config

_CONTAINERS = (dict, list, set)


def _shallow(attributes: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Each attribute with a copy of its contents, if it is a plain container."""
    return {
        name: (value, value.copy() if isinstance(value, _CONTAINERS) else None)
        for name, value in attributes.items()
    }


def _put_back(attributes: dict[str, Any], old: dict[str, tuple[Any, Any]]) -> None:
    """The same objects under the same names, containers with the contents they had."""
    for name in [name for name in attributes if name not in old]:
        del attributes[name]
    for name, (value, contents) in old.items():
        attributes[name] = value
        if contents is not None and not _same(value, contents):
            if isinstance(value, list):
                value[:] = contents
            else:
                value.clear()
                value.update(contents)


def _same(value: Any, contents: Any) -> bool:
    """Identity of every item: tensors have no truth value to compare by."""
    if len(value) != len(contents):
        return False
    if isinstance(value, dict):
        return all(k in contents and contents[k] is item for k, item in value.items())
    if isinstance(value, list):
        return all(a is b for a, b in zip(value, contents, strict=True))
    return {id(item) for item in value} == {id(item) for item in contents}


def _held(model: nn.Module) -> list[dict[str, Any]]:
    """The attributes of every module, and of every config that one holds."""
    spaces = [vars(module) for module in model.modules()]
    configs = [vars(value) for space in spaces for value in space.values() if is_config(value)]
    return list({id(space): space for space in (*spaces, *configs)}.values())


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

    Module attributes (values cached by a forward, lists it appends to) and tables, training
    flags, random states, the attention switch.
    """
    held = [(contents, _shallow(contents)) for contents in _held(model)]
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
        for attributes, _ in held:
            attributes["training"] = training
        fork = torch.random.fork_rng(devices, device_type=kind) if devices else _cpu_fork()
        # A look without gradients draws warnings that no run of the user's would.
        with fork, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _clear(caches)
        for attributes, old in held:
            _put_back(attributes, old)
        silent.disabled = disabled
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.backends.mha.set_fastpath_enabled(fast_path)
