"""Skips over several modules, after one of them has gone."""

from __future__ import annotations

from torch import nn

from neuroexapt.edit import fitting_class
from neuroexapt.edit.graft import HOLD
from neuroexapt.edit.hold import Hold, Join
from neuroexapt.errors import EditError
from neuroexapt.guard.ledger import Ledger, drop_item, set_class


def settle_skips(ledger: Ledger, model: nn.Module, place: str) -> None:
    """Take away the beginnings of skips whose end has gone with the module at ``place``.

    Raises:
        EditError: a skip that ends elsewhere has lost its beginning.
    """
    taken = {id(module.hold) for module in model.modules() if isinstance(module, Join)}
    begun: set[int] = set()
    for path, module in list(model.named_modules()):
        for name, child in list(module._modules.items()):
            if not name.startswith(HOLD) or not isinstance(child, Hold):
                continue
            begun.add(id(child))
            if id(child) not in taken:
                drop_item(ledger, module._modules, name)
                set_class(ledger, module, fitting_class(module))
                ledger.note({"do": "drop", "module": f"{path}.{name}".lstrip(".")})
    if taken - begun:
        raise EditError(
            place,
            seen="a module with the beginning of a skip that ends outside of it",
            needed="one with both ends, or none",
            next_step="remove the nx_join at the skip's end first",
        )
