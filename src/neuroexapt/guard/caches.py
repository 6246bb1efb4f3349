"""What a model computed from its weights is dropped when they are resized."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from neuroexapt.capture.derived import begin_training, keepers
from neuroexapt.guard.ledger import Ledger


def drop_caches(ledger: Ledger, model: nn.Module) -> None:
    """Have every module with a ``train`` of its own forget the tensors it keeps; flags stay."""
    for module in keepers(model):
        before = {name: _copied(value) for name, value in vars(module).items()}
        ledger.do(partial(begin_training, module), partial(_put_back, module, before))


def _copied(value: Any) -> tuple[Any, Any]:
    """A value, and what it holds now if that may change in place."""
    return value, value.copy() if type(value) in (dict, list) else None


def _put_back(module: nn.Module, before: dict[str, tuple[Any, Any]]) -> None:
    for name in vars(module).keys() - before.keys():
        del vars(module)[name]
    for name, (value, contents) in before.items():
        if type(value) is dict:
            value.clear()
            value.update(contents)
        elif type(value) is list:
            value[:] = contents
        vars(module)[name] = value
