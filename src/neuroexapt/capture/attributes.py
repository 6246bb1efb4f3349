"""Whole numbers that a model holds: in attributes, and in the configs that modules share."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import types
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

_PLAIN_HOLDERS = (argparse.Namespace, types.SimpleNamespace)
_HOLDER_NAMES = ("Config", "Args", "Arguments", "HParams", "Options", "Settings", "Spec")
_LONGEST = 8  # no model keeps its sizes in a longer list; tables of other things are


@dataclass(frozen=True)
class Attribute:
    """A Python attribute of a module.

    ``name`` is the attribute itself (``heads``), or a path into an object, a dictionary or a
    sequence that the module holds (``config.n_head``, ``sizes.0``).
    """

    module: str
    name: str


@dataclass(frozen=True)
class Integer:
    """A whole number that a model holds.

    A config that several modules hold is met once: whoever reads it reads one number.
    """

    at: Attribute
    value: int


def read(model: nn.Module, at: Attribute) -> Any:
    """The value of an attribute; also of one that its class computes.

    Raises:
        AttributeError, KeyError, IndexError: there is none.
    """
    first, *way = at.name.split(".")
    value = getattr(model.get_submodule(at.module), first)
    for step in way:
        value = value[int(step)] if isinstance(value, (list, tuple)) else _contents(value)[step]
    return value


def write(model: nn.Module, at: Attribute, value: Any) -> None:
    """Set an attribute; a tuple on the way is replaced by one that has the value in its place."""
    parent, _, last = at.name.rpartition(".")
    if not parent:
        own = vars(model.get_submodule(at.module))
        if last in own:  # past a __setattr__ of the user's, which may count or refuse
            own[last] = value
        else:
            setattr(model.get_submodule(at.module), last, value)
        return
    holder = read(model, Attribute(at.module, parent))
    if isinstance(holder, tuple):
        place = int(last)
        changed = type(holder)((*holder[:place], value, *holder[place + 1 :]))
        write(model, Attribute(at.module, parent), changed)
    elif isinstance(holder, list):
        holder[int(last)] = value
    else:
        _contents(holder)[last] = value


@contextlib.contextmanager
def attributes_set(model: nn.Module, values: Mapping[Attribute, Any]) -> Iterator[None]:
    """Set attributes for the duration of the block; put the old ones back."""
    old = {at: read(model, at) for at in values}
    try:
        for at, value in values.items():
            write(model, at, value)
        yield
    finally:
        for at, value in old.items():
            write(model, at, value)


def integers(model: nn.Module) -> Iterator[Integer]:
    """Every whole number above 1 that a module or its config holds, each once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue  # its attributes are not Python's
        for name, value in list(vars(module).items()):
            if not name.startswith("_"):
                yield from _integers(Attribute(path, name), value, seen)


def _integers(at: Attribute, value: Any, seen: set[int]) -> Iterator[Integer]:
    if type(value) is int:
        if value > 1:
            yield Integer(at, value)
        return
    items = _items(value)
    if items and id(value) not in seen:
        seen.add(id(value))
        for key, item in items:
            yield from _integers(Attribute(at.module, f"{at.name}.{key}"), item, seen)


def _items(value: Any) -> list[tuple[str, Any]]:
    """What is inside a sequence or a config; other objects may keep sizes in step themselves."""
    if type(value) in (list, tuple, torch.Size):
        return [(str(i), item) for i, item in enumerate(value)] if len(value) <= _LONGEST else []
    if isinstance(value, (nn.Module, type)) or not (isinstance(value, dict) or is_config(value)):
        return []
    contents = _contents(value)
    return [(k, v) for k, v in contents.items() if isinstance(k, str) and "." not in k]


def is_config(value: Any) -> bool:
    """Whether an object only holds settings: other objects may keep sizes in step themselves."""
    return (
        not isinstance(value, (nn.Module, type))
        and hasattr(value, "__dict__")
        and (
            isinstance(value, _PLAIN_HOLDERS)
            or dataclasses.is_dataclass(value)
            or type(value).__name__.endswith(_HOLDER_NAMES)
        )
    )


def _contents(value: Any) -> MutableMapping[str, Any]:
    return value if isinstance(value, dict) else vars(value)
