"""Layers that stand in a list and hold the number of their place: ``layer_idx`` and the like.

Such a number is most often the place of the layer's keys and values in a cache, so a further layer
needs one that is free, and a config that says how many there are must say one more.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from neuroexapt.capture.attributes import Attribute

# Names of whole numbers that count something else than layers.
_GEOMETRY = re.compile(
    r"dilation|stride|pad|kernel|group|dim|size|width|channel|feature|head|hidden|rank|rate|step"
)
_LAYER_NAME = re.compile(r"(layer|block).*(id|idx|index|num|number)$|^(id|idx|index|layer)$")
_TOTAL_NAME = re.compile(
    r"(n|num|number)_?((of|hidden|encoder|decoder|transformer|attention|text)_)*(layers?|blocks)"
    r"|(encoder|decoder)_(layers|blocks)|depth|n_?layers?"
)
_INSERTED, _REMOVED = "nx_", "nx_pass"


@dataclass(frozen=True)
class Stack:
    """Layers in one container, and a number by which each of them knows its place.

    Attributes:
        container: path of the container.
        name: name of the attribute that counts.
        counters: every place of it, with its value; inserted copies of layers included.
        first: the number of the first layer: 0 or 1, or more where an earlier stack began to count.
        last: the largest number in use, or that a removed layer had.
        totals: numbers in configs that say how many layers there are.
        tables: lists in configs with an entry a layer, and what they hold.
    """

    container: str
    name: str
    counters: tuple[tuple[Attribute, int], ...]
    first: int
    last: int
    totals: tuple[Attribute, ...] = ()
    tables: tuple[tuple[Attribute, Any], ...] = ()

    def holds(self, path: str) -> bool:
        """Whether a module lies in the container."""
        return path.startswith(f"{self.container}.".lstrip("."))

    def continues(self, path: str) -> bool:
        """Whether a copy of a module must go on counting.

        Layers inside what is copied (a stage, say) are most often counted through the whole
        model, other things (experts) in each layer anew.
        """
        return self.holds(path) or "layer" in self.name or "block" in self.name

    @property
    def count(self) -> int:
        """How many numbers configs and caches have a place for: those of removed layers too."""
        return self.last + 1 - self.first


def counted_with(stacks: Iterable[Stack], stack: Stack) -> list[Stack]:
    """The stacks that share one count with a stack, itself among them.

    One count may run through several containers (stages); others each have their own (an
    encoder and a decoder).
    """
    alike = [other for other in stacks if other.name == stack.name]
    return alike if any(other.first > 1 for other in alike) else [stack]


def role_of(path: str) -> str:
    """What a module is in its layer: its last name that is neither a number nor reserved.

    Example:
        >>> role_of("decoder.layers.0.nx_next.self_attn"), role_of("decoder.layers.0.nx_next")
        ('self_attn', 'layers')
    """
    names = [n for n in path.split(".") if not n.isdigit() and not n.startswith(_INSERTED)]
    return names[-1] if names else ""


def find_stacks(model: nn.Module) -> tuple[Stack, ...]:
    """Every container of layers that are counted, outer ones first.

    Example:
        >>> class Layer(nn.Linear):
        ...     def __init__(self, layer_idx):
        ...         super().__init__(2, 2)
        ...         self.layer_idx = layer_idx
        >>> [stack.name for stack in find_stacks(nn.Sequential(Layer(0), Layer(1)))]
        ['layer_idx']
    """
    configs = list(_configs(model))
    found: list[Stack] = []
    counted: set[Attribute] = set()  # by a container further out
    for path, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            for stack in _stacks_of(path, module, configs):
                if not counted >= {at for at, _ in stack.counters}:
                    found.append(stack)
                    counted.update(at for at, _ in stack.counters)
    return tuple(found)


def _stacks_of(
    path: str, container: nn.Module, configs: list[tuple[Attribute, Any]]
) -> Iterator[Stack]:
    places: dict[str, list[tuple[int, Attribute, int]]] = {}
    layers = [(n, m) for n, m in container._modules.items() if m and not n.startswith(_INSERTED)]
    for position, (name, layer) in enumerate(layers):
        for inner, module in layer.named_modules(prefix=f"{path}.{name}".lstrip(".")):
            for attribute, value in _numbers(module):
                at = Attribute(inner, attribute)
                places.setdefault(attribute, []).append((position, at, value))
    removed = {number for number, (_, layer) in enumerate(layers) if _has_removed(layer)}
    for name, found in places.items():
        own = [place for place in found if not _inserted_behind(place[1].module)]
        first = _first(name, own, removed)
        if not own and _LAYER_NAME.search(name):  # all that is left are copies
            first = min(value for _, _, value in found)
        if first is not None:
            counters = tuple((at, value) for _, at, value in found)
            gone = [first + number for number in removed]
            last = max(*gone, *(value for _, value in counters), first)
            yield _with_configs(Stack(path, name, counters, first, last), configs)


def _numbers(module: nn.Module) -> Iterator[tuple[str, int]]:
    if type(module).__module__.startswith("torch.nn.") or _REMOVED in module._modules:
        return  # none of torch's own layers knows its place, and a removed one has none
    for name, value in vars(module).items():
        if type(value) is int and not _GEOMETRY.search(name):
            yield name, value


def _has_removed(layer: nn.Module) -> bool:
    return any(_REMOVED in module._modules for module in layer.modules())


def _inserted_behind(path: str) -> bool:
    return any(part.startswith(_INSERTED) for part in path.split("."))


def _first(name: str, places: list[tuple[int, Attribute, int]], removed: set[int]) -> int | None:
    """The number of the first layer, if an attribute is in step with the position of its layer.

    By its name, if there is one layer alone, where the count goes on from another container, or
    where a layer has taken over the number of a removed one.
    """
    by_name = bool(_LAYER_NAME.search(name))
    for first in sorted({0, *(value - position for position, _, value in places)}):
        moved = [value for position, _, value in places if value - position != first]
        if first < 0 or not places or (moved and not by_name):
            continue
        if all(value - first in removed for value in moved):
            alone = len({position for position, _, _ in places}) == 1
            return first if by_name or (not alone and first in (0, 1)) else None
    return None


def _configs(model: nn.Module) -> Iterator[tuple[Attribute, Any]]:
    """Every config that a module holds, each once, by the outermost module that does."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        config = vars(module).get("config")
        plain = hasattr(config, "__dict__") and not isinstance(config, (type, nn.Module))
        if plain and callable(getattr(config, "to_dict", None)) and id(config) not in seen:
            seen.add(id(config))
            yield Attribute(path, "config"), config


def _with_configs(stack: Stack, configs: list[tuple[Attribute, Any]]) -> Stack:
    totals: list[Attribute] = []
    tables: list[tuple[Attribute, Any]] = []
    for at, config in configs:
        if not _concerns(at.module, stack.container):
            continue
        said = vars(config)
        for name in _totals(said, stack):
            totals.append(Attribute(at.module, f"{at.name}.{name}"))
        for name, value in said.items():
            if type(value) in (list, tuple) and len(value) == stack.count and "layer" in name:
                tables.append((Attribute(at.module, f"{at.name}.{name}"), value))
    return replace(stack, totals=tuple(totals), tables=tuple(tables))


def _concerns(holder: str, container: str) -> bool:
    inside, outside = f"{holder}.".lstrip("."), f"{container}.".lstrip(".")
    return outside.startswith(inside) or inside.startswith(outside)


def _totals(said: Mapping[str, Any], stack: Stack) -> list[str]:
    """Names of numbers in a config that count these layers.

    Where a config has one for either side, a number of no side counts for both: T5 makes the
    cache of its decoder by ``num_layers``.
    """
    other = "encoder" if "decoder" in stack.container else "decoder"
    return [
        name
        for name, value in said.items()
        if type(value) is int
        and value == stack.count
        and _TOTAL_NAME.fullmatch(name)
        and other not in name
    ]
