"""Change what a module does without wrapping it: names, indices and identities stay.

The module's class is replaced by a generated subclass of itself, the way
``torch.nn.utils.parametrize`` does it. What is added is a child under a reserved name, whose
beginning says where it takes part (x is the module's first input, y its first output):

=========== ========================================= =======================================
``nx_skip``  y + child(x)                              a residual connection around the module
``nx_after`` y + child(y)                              a residual branch behind it
``nx_then``  child(y)                                  a gate, a pool, dropout
``nx_next``  child(y, the module's other inputs)       a further block, called like this one
``nx_hold``  child(x), its result unused               keeps x for an ``nx_join`` further on
``nx_join``  y + child(): it holds an ``nx_hold``      the end of a skip over several modules
``nx_pass``  child(all inputs) instead of the module   what is left of a removed layer
=========== ========================================= =======================================

They take part in the order in which they were added. Containers neither iterate over them nor
count them. A weight with a mask (a buffer under ``nx_mask_<name>``) is read as their product.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from neuroexapt.edit.masked import masked_members, masked_names

SKIP, AFTER, THEN, NEXT = "nx_skip", "nx_after", "nx_then", "nx_next"
HOLD, JOIN, PASS = "nx_hold", "nx_join", "nx_pass"
LINEAGE = "_nx_lineage"  # the attribute that remembers what was done to a model
_ROLES = (SKIP, AFTER, THEN, NEXT, HOLD, JOIN, PASS)
_CLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def is_branch(name: str) -> bool:
    """Whether a child's name is one reserved for what edits insert."""
    return name.startswith(_ROLES)


def free_name(module: nn.Module, prefix: str) -> str:
    """The prefix, or the first prefix with a number that the module does not have yet.

    Example:
        >>> free_name(nn.Linear(1, 1), AFTER)
        'nx_after'
    """
    taken = set(module._modules)
    names = [prefix, *(f"{prefix}{number}" for number in range(2, len(taken) + 3))]
    return next(name for name in names if name not in taken)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class the user wrote."""
    kind: type[nn.Module] = getattr(type(module), "_nx_original", type(module))
    return kind


def fitting_class(module: nn.Module) -> type[nn.Module]:
    """The class a module should have for the children and masks it holds now."""
    kind, masked = original_class(module), masked_names(module)
    if masked or any(is_branch(name) for name in module._modules):
        return grafted_class(kind, masked)
    return kind


def grafted_class(kind: type[nn.Module], masked: Iterable[str] = ()) -> type[nn.Module]:
    """The generated subclass of a module class; one per class, so that types compare equal.

    Args:
        kind: the class the user wrote.
        masked: names of the parameters that are read through a mask.

    Example:
        >>> grafted_class(nn.Linear).__name__, issubclass(grafted_class(nn.Linear), nn.Linear)
        ('GraftedLinear', True)
    """
    key = kind, tuple(sorted(masked))
    if key not in _CLASSES:
        forward = _forward_of(kind)
        members: dict[str, Any] = {
            "_nx_original": kind,
            "forward": forward,
            "extra_repr": _extra_repr_of(kind),
            "__reduce_ex__": _reduce,
            "__module__": kind.__module__,
            "__doc__": kind.__doc__,
            **masked_members(forward, kind, key[1]),
        }
        if issubclass(kind, nn.Sequential):
            members.update(_sequential_members(kind))
        _CLASSES[key] = type(f"Grafted{kind.__name__}", (kind,), members)
    return _CLASSES[key]


def _forward_of(kind: type[nn.Module]) -> Any:
    original = kind.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        added = [(n, m) for n, m in self._modules.items() if m is not None and is_branch(n)]
        for name, child in added:
            if name.startswith(HOLD):
                child(_first(args, kwargs))
        passage = self._modules.get(PASS)
        out = original(self, *args, **kwargs) if passage is None else passage(*args, **kwargs)
        for name, child in added:
            out = _with(out, name, child, args, kwargs)
        return out

    return forward


def _extra_repr_of(kind: type[nn.Module]) -> Any:
    original = kind.extra_repr

    @functools.wraps(original)
    def extra_repr(self: nn.Module) -> str:
        # What the layer would say of itself it reads off weights that a removed one has no more.
        return "removed" if PASS in self._modules else original(self)

    return extra_repr


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _with(out: Any, name: str, child: nn.Module, args: tuple[Any, ...], kwargs: Any) -> Any:
    """The module's output once a child has taken part."""
    if isinstance(out, tuple):
        items = _with(out[0], name, child, args, kwargs), *out[1:]
        return out._make(items) if hasattr(out, "_make") else items  # a named tuple stays one
    if name.startswith(SKIP):
        return out + child(_first(args, kwargs))
    if name.startswith(AFTER):
        return out + child(out)
    if name.startswith(THEN):
        return child(out)
    if name.startswith(JOIN):
        return out + child()
    if name.startswith(NEXT):
        rest = kwargs if args else dict(list(kwargs.items())[1:])
        further = child(out, *args[1:], **rest)
        return further[0] if isinstance(further, tuple) else further
    return out


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    # A generated class cannot be found by name: pickle and copy rebuild it from the original.
    state = getattr(self, "__getstate__", lambda: self.__dict__)()  # on object since 3.11
    return _bare, (original_class(self), masked_names(self)), state


def _bare(kind: type[nn.Module], masked: tuple[str, ...] = ()) -> nn.Module:
    grafted = grafted_class(kind, masked)
    return grafted.__new__(grafted)


@contextlib.contextmanager
def _branches_hidden(module: nn.Module) -> Iterator[None]:
    branches = {name: child for name, child in module._modules.items() if is_branch(name)}
    for name in branches:
        del module._modules[name]
    try:
        yield
    finally:
        module._modules.update(branches)


def _sequential_members(kind: type[nn.Sequential]) -> dict[str, Any]:
    """Container methods that do not see the branches."""

    def visible(self: nn.Sequential) -> dict[str, nn.Module]:
        return {n: m for n, m in self._modules.items() if m is not None and not is_branch(n)}

    def getitem(self: nn.Sequential, index: Any) -> Any:
        items = visible(self)
        if isinstance(index, slice):
            part = kind()
            for name, child in list(items.items())[index]:
                part.add_module(name, child)
            return part
        return list(items.values())[index]

    def hidden(name: str) -> Any:
        method = getattr(kind, name)

        @functools.wraps(method)
        def call(self: nn.Sequential, *args: Any) -> Any:
            with _branches_hidden(self):
                return method(self, *args)

        return call

    members = {n: hidden(n) for n in ("__setitem__", "__delitem__", "append", "insert", "extend")}
    members["__iter__"] = lambda self: iter(visible(self).values())
    members["__len__"] = lambda self: len(visible(self))
    members["__getitem__"] = getitem
    return members
