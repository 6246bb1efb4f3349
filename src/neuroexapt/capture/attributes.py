"""Whole numbers that a model holds: in attributes, and in the configs that modules share."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import types
from collections.abc import Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import nn

_PLAIN_HOLDERS = (argparse.Namespace, types.SimpleNamespace)
_HOLDER_NAMES = ("Config", "Args", "Arguments", "HParams", "Options", "Settings", "Spec")


@dataclass(frozen=True)
class Attribute:
    """A Python attribute of a module.

    ``name`` is the attribute itself (``heads``), or a path into an object or a dictionary
    that the module holds (``config.n_head``).
    """

    module: str
    name: str


@dataclass(frozen=True)
class Integer:
    """A whole number that a model holds, and the dictionary in which it is written.

    A config that several modules hold is met once: whoever reads it reads one number.
    """

    at: Attribute
    holder: MutableMapping[str, Any]
    key: str
    value: int


def holder_of(model: nn.Module, at: Attribute) -> tuple[MutableMapping[str, Any], str]:
    """The dictionary in which an attribute is written, and its key there.

    Raises:
        KeyError: the path leads nowhere any more.
    """
    holder: MutableMapping[str, Any] = vars(model.get_submodule(at.module))
    *way, key = at.name.split(".")
    for step in way:
        holder = _contents(holder[step])
    return holder, key


def read(model: nn.Module, at: Attribute) -> Any:
    """The value of an attribute; also of one that its class computes.

    Raises:
        AttributeError: there is none.
    """
    if "." in at.name:
        holder, key = holder_of(model, at)
        return holder[key]
    return getattr(model.get_submodule(at.module), at.name)


def write(model: nn.Module, at: Attribute, value: Any) -> None:
    """Set an attribute."""
    if "." in at.name:
        holder, key = holder_of(model, at)
        holder[key] = value
    else:
        setattr(model.get_submodule(at.module), at.name, value)


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
        yield from _integers(path, "", vars(module), seen)


def _integers(
    module: str, prefix: str, holder: MutableMapping[str, Any], seen: set[int]
) -> Iterator[Integer]:
    if id(holder) in seen:
        return
    seen.add(id(holder))
    for key, value in list(holder.items()):
        if not isinstance(key, str) or "." in key or (key.startswith("_") and not prefix):
            continue
        name = f"{prefix}{key}"
        if type(value) is int and value > 1:
            yield Integer(Attribute(module, name), holder, key, value)
        elif _is_holder(value):
            yield from _integers(module, f"{name}.", _contents(value), seen)


def _is_holder(value: Any) -> bool:
    """Configs only: other objects may keep sizes in step by themselves."""
    if isinstance(value, (nn.Module, type)):
        return False
    if isinstance(value, dict):
        return all(isinstance(key, str) for key in value)
    return hasattr(value, "__dict__") and (
        isinstance(value, _PLAIN_HOLDERS)
        or dataclasses.is_dataclass(value)
        or type(value).__name__.endswith(_HOLDER_NAMES)
    )


def _contents(value: Any) -> MutableMapping[str, Any]:
    return value if isinstance(value, dict) else vars(value)
