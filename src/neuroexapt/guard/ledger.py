"""Every write of the library goes through a ledger that knows how to take it back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from neuroexapt.capture.attributes import Attribute, read, write
from neuroexapt.capture.interrupts import held_back
from neuroexapt.errors import GuardError
from neuroexapt.guard.holders import held

Change = dict[str, Any]


class Ledger:
    """An ordered list of writes, each with its way back.

    The way back is noted before the write, and works whether or not the write took place, so
    an interruption at any point (KeyboardInterrupt too) leaves nothing half done.

    Example:
        >>> box, ledger = {"x": 1}, Ledger()
        >>> ledger.do(lambda: box.update(x=2), lambda: box.update(x=1))
        >>> ledger.roll_back()
        >>> box
        {'x': 1}
    """

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self._changes: list[tuple[int, Change]] = []
        # What the object of a replaced tensor held before its first replacement, by its id.
        self.shadows: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self._undo)

    def do(self, write: Callable[[], object], undo: Callable[[], object]) -> None:
        """Note the way back, then write."""
        self._undo.append(undo)
        write()

    def note(self, change: Change) -> None:
        """Say what the last write was, as data; see :mod:`neuroexapt.guard.lineage`."""
        self._changes.append((len(self._undo), change))

    def changes(self, since: int = 0) -> list[Change]:
        """What was noted after the first ``since`` writes, and has not been taken back."""
        return [change for at, change in self._changes if at > since]

    def note_first(self, undo: Callable[[], object]) -> None:
        """Note a way back that is walked last, after those of all writes so far."""
        self._undo.insert(0, undo)

    def roll_back(self, to: int = 0) -> None:
        """Take back every write after the first ``to``, last one first.

        An interruption meanwhile waits until all is taken back. One that a way back raises itself
        is raised then too: every way back may be walked twice.

        Raises:
            GuardError: a way back failed; the others have been taken all the same.
        """
        with held_back():
            self._walk_back(to)

    def _walk_back(self, to: int) -> None:
        failures: list[str] = []
        interruption: KeyboardInterrupt | None = None
        while len(self._undo) > to:
            try:
                self._undo[-1]()
            except KeyboardInterrupt as signal:
                interruption = signal
                continue
            except RuntimeError as error:
                failures.append(str(error))
            self._undo.pop()
        self._changes = [(at, change) for at, change in self._changes if at <= to]
        if interruption is not None:
            raise interruption
        if failures:
            raise GuardError(
                "roll back",
                seen="; ".join(failures),
                needed="a way back for every write",
                next_step="load your last checkpoint; this model may be changed in part",
            )

    def forget(self) -> None:
        """Accept every write; nothing keeps the old tensors alive any more."""
        self._undo.clear()
        self._changes.clear()
        self.shadows.clear()


def swap(ledger: Ledger, tensor: Tensor, new: Tensor, name: str) -> None:
    """Give a tensor object the content of another one; the object and all references to it stay.

    Raises:
        GuardError: a live graph or a weak reference forbids it.
    """
    before = _content(tensor)
    resized = {"tensor": name, "before": list(tensor.shape), "after": list(new.shape)}

    def undo() -> None:
        if ledger.shadows.get(id(tensor)) is new:
            del ledger.shadows[id(tensor)]
        if _content(tensor) == before:
            return
        try:
            torch.utils.swap_tensors(tensor, _revived(new))
        except RuntimeError:
            # A graph built since the edit holds the object: its content can go back all the same.
            _put_back(tensor, new)

    def write() -> None:
        _carry_hooks(tensor, new)
        try:
            torch.utils.swap_tensors(tensor, new)
        except RuntimeError as error:
            raise held(name, str(error).splitlines()[0]) from error
        ledger.shadows.setdefault(id(tensor), new)

    ledger.do(write, undo)
    if resized["before"] != resized["after"]:
        ledger.note({"do": "resize", **resized})


def _revived(shadow: Tensor) -> Tensor:
    """The old content in a new tensor object: same memory, same gradient.

    ``swap_tensors`` forbids the graph node of a tensor it swaps away to ever run again, and a
    loss that the user still holds keeps that node alive into the next step.
    """
    fresh: Tensor = shadow.detach()
    if isinstance(shadow, nn.Parameter):
        fresh = nn.Parameter(fresh, requires_grad=shadow.requires_grad)
        fresh.grad = shadow.grad
    _carry_hooks(shadow, fresh)
    return fresh


def _content(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.untyped_storage()._cdata, tuple(tensor.shape)


def _put_back(tensor: Tensor, old: Tensor) -> None:
    """Give a tensor its old memory and gradient while a graph holds it.

    The graph's gradient node knows the other shape and would be reused as long as the graph
    lives; torch parts from it when the dtype changes.
    """
    tensor.grad = None
    tensor.data = old.new_empty(
        0, dtype=torch.float32 if old.dtype == torch.float64 else torch.float64
    )
    tensor.data = old.data
    tensor.grad = old.grad


def _carry_hooks(tensor: Tensor, new: Tensor) -> None:
    # Hooks live in the part that is swapped away; sharing the dict keeps their handles valid.
    for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        hooks = getattr(tensor, kind, None)
        if hooks:
            setattr(new, kind, hooks)
    new.__dict__.update(tensor.__dict__)
    new.__class__ = type(tensor)


def set_attribute(ledger: Ledger, model: nn.Module, at: Attribute, value: object) -> None:
    """Set an attribute of a module, or a number in a config or sequence that it holds."""
    old = read(model, at)
    ledger.do(lambda: write(model, at, value), lambda: write(model, at, old))
    # A list that is written may be written into later on.
    kept = copy.deepcopy(value) if isinstance(value, (list, dict)) else value
    ledger.note({"do": "set", "module": at.module, "name": at.name, "value": kept})


def set_class(ledger: Ledger, module: nn.Module, kind: type[nn.Module]) -> None:
    """Give a module another class."""
    old = type(module)

    def write() -> None:
        module.__class__ = kind

    def undo() -> None:
        module.__class__ = old

    ledger.do(write, undo)


def add_child(ledger: Ledger, module: nn.Module, name: str, child: nn.Module) -> None:
    """Give a module a new child."""
    ledger.do(lambda: module.add_module(name, child), lambda: module._modules.pop(name, None))


def put_item(ledger: Ledger, held: dict[str, Any], name: str, value: object) -> None:
    """Set an item of a dictionary; the order of the others stays, also on the way back."""
    _set_items(ledger, held, {**held, name: value})


def drop_item(ledger: Ledger, held: dict[str, Any], name: str) -> None:
    """Take an item out of a dictionary, if it is there."""
    _set_items(ledger, held, {key: value for key, value in held.items() if key != name})


def _set_items(ledger: Ledger, held: dict[str, Any], new: dict[str, Any]) -> None:
    ledger.do(partial(_become, held, new), partial(_become, held, dict(held)))


def _become(held: dict[str, Any], contents: dict[str, Any]) -> None:
    held.clear()
    held.update(contents)
