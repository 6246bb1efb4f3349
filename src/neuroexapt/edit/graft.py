"""Add a branch to a module without wrapping it: names, indices and identities stay.

The module's class is replaced by a generated subclass of itself whose forward runs the
original and adds the branches, the way ``torch.nn.utils.parametrize`` does it. A branch is a
child under a reserved name: ``nx_after*`` reads the module's output, ``nx_skip*`` its input.
Containers neither iterate over it nor count it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

AFTER, SKIP = "nx_after", "nx_skip"
_CLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def is_branch(name: str) -> bool:
    """Whether a child's name is one reserved for inserted branches."""
    return name.startswith((AFTER, SKIP))


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


def grafted_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The generated subclass of a module class; one per class, so that types compare equal.

    Example:
        >>> grafted_class(nn.Linear).__name__, issubclass(grafted_class(nn.Linear), nn.Linear)
        ('GraftedLinear', True)
    """
    if kind not in _CLASSES:
        members: dict[str, Any] = {
            "_nx_original": kind,
            "forward": _forward_of(kind),
            "__reduce_ex__": _reduce,
            "__module__": kind.__module__,
            "__doc__": kind.__doc__,
        }
        if issubclass(kind, nn.Sequential):
            members.update(_sequential_members(kind))
        _CLASSES[kind] = type(f"Grafted{kind.__name__}", (kind,), members)
    return _CLASSES[kind]


def _forward_of(kind: type[nn.Module]) -> Any:
    original = kind.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        out: Tensor = original(self, *args, **kwargs)
        for name, child in self._modules.items():
            if name.startswith(SKIP) and child is not None:
                out = out + child(args[0] if args else next(iter(kwargs.values())))
            elif name.startswith(AFTER) and child is not None:
                out = out + child(out)
        return out

    return forward


def _reduce(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
    # A generated class cannot be found by name: pickle and copy rebuild it from the original.
    state = getattr(self, "__getstate__", lambda: self.__dict__)()  # on object since 3.11
    return _bare, (original_class(self),), state


def _bare(kind: type[nn.Module]) -> nn.Module:
    grafted = grafted_class(kind)
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
