"""Blocks that know their number, and the caches that go by it.

A block of a decoder keeps its keys and values in a cache under its number (``layer_idx``). Such a
cache asks one place how much it holds: the first of all, or the first of its kind. When the block
there goes, the next one of that kind takes over its number, else the cache would look empty.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from neuroexapt.capture.attributes import Attribute
from neuroexapt.capture.stacks import counted_with, find_stacks, role_of
from neuroexapt.edit.graft import is_branch, original_class
from neuroexapt.errors import EditError
from neuroexapt.guard.ledger import Ledger, set_attribute

_NAMES = ("layer_idx", "layer_index", "layer_id", "layer_number", "block_idx", "block_index")
_CACHE = re.compile(r"past|cache")  # what an argument is called that holds keys and values
_CROSS = re.compile(r"cross|enc", re.IGNORECASE)  # attention to a memory: nobody asks its cache
Counters = list[tuple[Attribute, int]]


def renumber(ledger: Ledger, model: nn.Module, path: str) -> None:
    """Before the module at ``path`` goes: let others have its numbers, where they must.

    What attends to its own sequence and what attends to a memory have caches of their own, so
    each hands its number on to its like.

    Raises:
        EditError: a cache looks at this block alone for its kind, and no other is left.
    """
    stacks = find_stacks(model)
    for stack in stacks:
        if stack.name in _NAMES and stack.holds(path):
            pool = counted_with(stacks, stack)
            counters = [counter for other in pool for counter in other.counters]
            roles = dict.fromkeys(role_of(at.module) for at, _ in counters if _goes(at, path))
            for role in roles:
                alike = [(at, value) for at, value in counters if role_of(at.module) == role]
                for at, number in _moved(model, path, alike):
                    set_attribute(ledger, model, at, number)


def _moved(model: nn.Module, path: str, alike: Counters) -> Iterator[tuple[Attribute, int]]:
    """Who of those that stay gets another number, and which."""
    going = [(at, value) for at, value in alike if _goes(at, path)]
    staying = [(at, value) for at, value in alike if not _goes(at, path)]
    kinds = _kinds(model, path)
    for kind in dict.fromkeys(_kind(kinds, value) for _, value in going):
        first = min(value for _, value in alike if _kind(kinds, value) == kind)
        others = [(at, value) for at, value in staying if _kind(kinds, value) == kind]
        if others:
            lowest = min(value for _, value in others)
            yield from ((at, first) for at, value in others if value == lowest != first)
        elif any(_fills(model, at) for at, _ in going) and (staying or _generates(model)):
            raise EditError(
                path,
                seen=f"the only layer of its kind ({kind}), to which caches look"
                if staying
                else "the last layer that fills a cache of keys and values",
                needed="another layer of this kind that can take over its number",
                next_step="remove another one",
            )


def _goes(at: Attribute, path: str) -> bool:
    """Whether it goes with the module at ``path``: what an edit put behind a layer stays."""
    if at.module != path and not at.module.startswith(f"{path}."):
        return False
    return is_branch(path.rpartition(".")[2]) or not is_branch(at.module[len(path) + 1 :])


def _fills(model: nn.Module, at: Attribute) -> bool:
    """Whether a module writes to a cache of the sequence that it works on."""
    forward = inspect.signature(original_class(model.get_submodule(at.module)).forward)
    takes = any(_CACHE.search(name) for name in forward.parameters)
    return takes and not _CROSS.search(role_of(at.module))


def _generates(model: nn.Module) -> bool:
    return any(callable(getattr(module, "generate", None)) for module in model.modules())


def _kinds(model: nn.Module, path: str) -> list[Any]:
    """What kind of layer each number is, as the config beside it says."""
    for module in model.get_submodule(path).modules():
        kinds = getattr(vars(module).get("config"), "layer_types", None)
        if isinstance(kinds, (list, tuple)):
            return list(kinds)
    return []


def _kind(kinds: list[Any], number: int) -> Any:
    return kinds[number] if number < len(kinds) else None
