"""What a module's generated class has for parameters with a mask: they are read as the product.

The stored parameter keeps its name, its object and its place in the optimizer; its entries under
the mask are zero and get no gradient, because the forward reads ``parameter * mask``.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from neuroexapt.capture.masks import MASK


def masked_names(module: nn.Module) -> tuple[str, ...]:
    """The parameters of a module that have a mask."""
    return tuple(sorted(n.removeprefix(MASK) for n in module._buffers if n.startswith(MASK)))


def masked_members(forward: Any, kind: type[nn.Module], masked: Iterable[str]) -> dict[str, Any]:
    """The members of a generated class through which masks take part.

    Args:
        forward: the forward the class would have without masks.
        kind: the class the user wrote.
        masked: names of the parameters with a mask.
    """
    members: dict[str, Any] = {name: _product(name) for name in masked}
    if members and issubclass(kind, nn.RNNBase):
        members.update(_recurrent(forward))
    return members


def _product(name: str) -> property:
    def weight(self: nn.Module) -> Tensor | None:
        if name not in self._parameters:
            raise AttributeError(name)
        stored, mask = self._parameters[name], self._buffers[f"{MASK}{name}"]
        return stored if stored is None or mask is None else stored * mask

    return property(weight)


def _recurrent(forward: Any) -> dict[str, Any]:
    """A recurrent module runs on a list of its weights, which it keeps: it gets the products for
    one run. Kept, their graph would outlive the step and forbid to copy the module."""

    @functools.wraps(forward)
    def run(self: nn.RNNBase, *args: Any, **kwargs: Any) -> Any:
        self._update_flat_weights()
        stored = self._flat_weights
        self._flat_weights = [getattr(self, name) for name in self._flat_weights_names]
        self.flatten_parameters()
        try:
            return forward(self, *args, **kwargs)
        finally:
            self._flat_weights = stored

    return {
        "forward": run,
        "_weights_have_changed": _others_stored,
        "_init_flat_weights": _refer_to_stored,
    }


def _others_stored(self: nn.RNNBase) -> bool:
    references = zip(self._flat_weight_refs, self._flat_weights_names, strict=True)
    return any(ref is not None and ref() is not self._parameters[n] for ref, n in references)


def _refer_to_stored(self: nn.RNNBase) -> None:
    self._flat_weights = [self._parameters[name] for name in self._flat_weights_names]
    self._flat_weight_refs = [
        None if weight is None else weakref.ref(weight) for weight in self._flat_weights
    ]
    self.flatten_parameters()
