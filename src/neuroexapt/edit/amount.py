"""What a model would cost at other sizes: arithmetic over the map, nothing is run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

from neuroexapt.capture import Call, TensorRef
from neuroexapt.capture.flops import batch_of, flops_of_call
from neuroexapt.couple import AxisMap, size_of

# A weight under these is the same numbers in another order or precision.
_SAME = {
    *(f"aten.{name}" for name in ("t", "transpose", "permute", "view", "_unsafe_view", "reshape")),
    *(f"aten.{name}" for name in ("_to_copy", "expand", "unsqueeze", "detach", "alias", "clone")),
}


@dataclass(frozen=True)
class Amounts:
    """Parameters and FLOPs of a model when its widths have other sizes.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from neuroexapt import map_axes
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> amounts = Amounts(map_axes(net, (torch.zeros(3, 4),)))
        >>> amounts.parameters({}), amounts.parameters({"0.out": 10}), amounts.flops({"0.out": 10})
        (58, 72, 120)
    """

    axes: AxisMap

    def parameters(self, sizes: Mapping[str, int]) -> int:
        """The number of parameters."""
        return sum(self.numel(name, sizes) for name in self.axes.parameters)

    def numel(self, name: str, sizes: Mapping[str, int]) -> int:
        """The number of entries of one tensor."""
        return prod(size_of(expr, sizes) for expr in self.axes.tensors[name])

    def flops(self, sizes: Mapping[str, int]) -> int:
        """FLOPs of one sample's forward.

        Exact for products with a weight. A product of two activations (attention) is taken to
        grow with the square of the largest growth of a width, which is never too little.
        """
        largest = max([1.0, *(n / self.axes.widths[name].size for name, n in sizes.items())])
        total = 0.0
        for now, weight in self._products:
            if weight is None:
                total += now * largest**2
            else:
                total += now * self.numel(weight, sizes) / self.numel(weight, {})
        return round(total / batch_of(self.axes.traces[0]))

    @cached_property
    def _products(self) -> tuple[tuple[int, str | None], ...]:
        """FLOPs of each call that has some, and the weight it reads."""
        trace = self.axes.traces[0]
        named: dict[TensorRef, str] = {}
        for name, ref in trace.tensors.items():
            if name in self.axes.parameters:
                named.setdefault(ref, name)
        found = []
        for call in trace.calls:
            if call.op in _SAME and call.inputs[0] in named:
                named.setdefault(call.outputs[0], named[call.inputs[0]])
            flops = flops_of_call(call)
            if flops:
                found.append((flops, _weight(call, named)))
        return tuple(found)


def _weight(call: Call, named: Mapping[TensorRef, str]) -> str | None:
    weights = [ref for ref in call.inputs if ref in named and len(ref.shape) > 1]
    return named[weights[0]] if weights else None
