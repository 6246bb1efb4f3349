"""Every write of the library goes through a ledger that knows how to take it back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from neuroexapt.errors import GuardError


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

    def __len__(self) -> int:
        return len(self._undo)

    def do(self, write: Callable[[], object], undo: Callable[[], object]) -> None:
        """Note the way back, then write."""
        self._undo.append(undo)
        write()

    def roll_back(self) -> None:
        """Take back every write, last one first.

        Raises:
            GuardError: a way back failed; the others have been taken all the same.
        """
        failures = []
        while self._undo:
            undo = self._undo.pop()
            try:
                undo()
            except RuntimeError as error:
                failures.append(str(error))
        if failures:
            raise GuardError(
                "roll back",
                seen="; ".join(failures),
                needed="no live autograd graph or weak reference on the tensors edited",
                next_step="load your last checkpoint; this model may be changed in part",
            )

    def extend(self, other: Ledger) -> None:
        """Take over the writes of another ledger, which is empty afterwards."""
        self._undo.extend(other._undo)
        other._undo.clear()

    def forget(self) -> None:
        """Accept every write; nothing keeps the old tensors alive any more."""
        self._undo.clear()


def swap(ledger: Ledger, tensor: Tensor, new: Tensor, name: str) -> None:
    """Give a tensor object the content of another one; the object and all references to it stay.

    Raises:
        GuardError: a live graph or a weak reference forbids it.
    """
    before = _content(tensor)

    def undo() -> None:
        if _content(tensor) != before:
            torch.utils.swap_tensors(tensor, new)

    def write() -> None:
        _carry_hooks(tensor, new)
        try:
            torch.utils.swap_tensors(tensor, new)
        except RuntimeError as error:
            raise GuardError(
                name,
                seen=str(error).splitlines()[0],
                needed="a tensor that no autograd graph and no weak reference holds",
                next_step="edit after optimizer.step(), and drop losses and outputs of the last "
                "step first (del loss, output)",
            ) from error

    ledger.do(write, undo)


def _content(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.untyped_storage()._cdata, tuple(tensor.shape)


def _carry_hooks(tensor: Tensor, new: Tensor) -> None:
    # Hooks live in the part that is swapped away; sharing the dict keeps their handles valid.
    for kind in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        hooks = getattr(tensor, kind, None)
        if hooks:
            setattr(new, kind, hooks)
    new.__dict__.update(tensor.__dict__)


def set_attribute(ledger: Ledger, module: nn.Module, name: str, value: object) -> None:
    """Set a module attribute."""
    old = getattr(module, name)
    ledger.do(lambda: setattr(module, name, value), lambda: setattr(module, name, old))


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
