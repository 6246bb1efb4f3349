"""Blocks that know their number, and the caches that go by it.

A block of a decoder keeps its keys and values in a cache under its number (``layer_idx``). Such a
cache asks one place how much it holds: the first of all, or the first of its kind. When the block
there goes, the next one of that kind takes over its number, else the cache would look empty.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from neuroexapt.capture.attributes import Attribute
from neuroexapt.errors import EditError
from neuroexapt.guard.ledger import Ledger, set_attribute

_NAMES = ("layer_idx", "layer_index", "layer_id", "layer_number", "block_idx", "block_index")


def renumber(ledger: Ledger, model: nn.Module, path: str) -> None:
    """Before the module at ``path`` goes: let another block have its number, where one must.

    Raises:
        EditError: a cache looks at this block alone for its kind, and no other is left.
    """
    numbers = {value for _, value in _numbers(model, path)}
    siblings = _siblings(model, path)
    if len(numbers) != 1 or siblings is None:
        return
    gone = numbers.pop()
    kinds = _kinds(model, path)
    alive = sorted(
        {v for other in siblings for at, v in _numbers(model, other) if not _inside(at, path)}
    )
    others = [n for n in alive if n != gone and _kind(kinds, n) == _kind(kinds, gone)]
    if gone in alive or any(number < gone for number in others):
        return
    if not others:
        if alive:
            raise EditError(
                path,
                seen=f"the only layer of its kind ({_kind(kinds, gone)}), to which caches look",
                needed="another layer of this kind that can take over its number",
                next_step="remove another one",
            )
        return
    for other in siblings:
        for at, value in list(_numbers(model, other)):
            if value == others[0] and not _inside(at, path):
                set_attribute(ledger, model, at, gone)


def _inside(at: Attribute, path: str) -> bool:
    return at.module == path or at.module.startswith(f"{path}.")


def _numbers(model: nn.Module, path: str) -> Iterator[tuple[Attribute, int]]:
    """The numbers that a module and its parts hold of themselves."""
    for name, module in model.get_submodule(path).named_modules(prefix=path):
        for key in _NAMES:
            value = vars(module).get(key)
            if type(value) is int:
                yield Attribute(name, key), value


def _siblings(model: nn.Module, path: str) -> list[str] | None:
    """The blocks of the list in which a module is, or is a part of one."""
    while path:
        parent, _, name = path.rpartition(".")
        if name.isdigit():
            holder = model.get_submodule(parent)
            return [".".join(filter(None, (parent, n))) for n in holder._modules if n.isdigit()]
        path = parent
    return None


def _kinds(model: nn.Module, path: str) -> list[Any]:
    """What kind of layer each number is, as the config beside it says."""
    for module in model.get_submodule(path).modules():
        kinds = getattr(vars(module).get("config"), "layer_types", None)
        if isinstance(kinds, (list, tuple)):
            return list(kinds)
    return []


def _kind(kinds: list[Any], number: int) -> Any:
    return kinds[number] if number < len(kinds) else None
