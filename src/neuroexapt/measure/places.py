"""Where a model's units can be looked at: one place a width, and the modules that keep a shape.

A width is looked at where it is read, behind activations and norms, since that is what the next
layer gets; where no reader shows it plainly, at the output of the module that makes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from neuroexapt.capture import ModuleRun, TensorRef
from neuroexapt.capture.trace import refs_in
from neuroexapt.couple import AxisMap, Leaf, Width, leaves
from neuroexapt.couple.index import Expr, Product, size_of


@dataclass(frozen=True)
class Place:
    """A tensor at a module's door, and which of its dimensions counts units.

    Attributes:
        name: the width, or the module's path.
        path: the module.
        entering: its first input, instead of its first output.
        dim: the dimension of units.
        units: their number.
        inner: how many neighbours along it belong to one unit (places of a flattened map).
        batch: the dimension of samples (with positions behind them, where both are one
            dimension); None where samples cannot be told apart.
    """

    name: str
    path: str
    entering: bool
    dim: int
    units: int
    inner: int = 1
    batch: int | None = 0


def width_places(axes: AxisMap) -> dict[str, Place]:
    """One place for each width that can be looked at, in the order in which they run.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from neuroexapt import map_axes
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
        >>> width_places(map_axes(net, (torch.zeros(2, 1, 6, 6),)))["0.out"]
        Place(name='0.out', path='3', entering=True, dim=1, units=4, inner=16, batch=0)
    """
    order = {run.path: run.start for trace in axes.traces for run in reversed(trace.runs)}
    found = [place for width in axes.widths.values() if (place := _place(axes, width))]
    found.sort(key=lambda place: order.get(place.path, 0))
    return {place.name: place for place in found}


def _place(axes: AxisMap, width: Width) -> Place | None:
    for role, entering in (("consumer", True), ("producer", False)):
        for appearance in width.appearances:
            path = appearance.tensor.rpartition(".")[0]
            if role not in appearance.roles or path not in axes.modules:
                continue
            doors = axes.modules[path]
            tensors = doors.inputs if entering else doors.outputs
            for dim, expr in enumerate(tensors[0]) if tensors else ():
                inner = _inner(expr, width.name)
                if dim and inner:
                    batch = _batch(axes, tensors[0])
                    return Place(width.name, path, entering, dim, width.size, inner, batch)
    return None


def _batch(axes: AxisMap, dims: tuple[Expr, ...]) -> int | None:
    """The dimension that is the first one of the model's input, by itself or before others."""
    model = axes.modules.get("")
    first = model.inputs[0][:1] if model and model.inputs else ()
    if not first or not isinstance(first[0], Leaf):
        return 0
    alone = [at for at, expr in enumerate(dims) if expr == first[0]]
    if alone:
        return alone[0]
    whole = dims[0]
    return 0 if isinstance(whole, Product) and whole.parts[0] == first[0] else None


def _inner(expr: Expr, name: str) -> int | None:
    """How many positions each unit has, if the dimension is units, or units times positions."""
    if isinstance(expr, Leaf):
        return 1 if expr.name == name else None
    if not isinstance(expr, Product) or expr.parts[0] != Leaf(name, _size(expr.parts[0])):
        return None
    rest = expr.parts[1:]
    again = any(leaf.name == name for part in rest for leaf in leaves(part))
    return None if again else prod(size_of(part, {}) for part in rest)


def _size(expr: Expr) -> int:
    return expr.size if isinstance(expr, Leaf) else -1


def block_places(axes: AxisMap) -> dict[str, tuple[Place, Place]]:
    """Input and output of each module with parameters that keeps the shape of its first input.

    Units are the dimension behind the batch for maps (4 and more dimensions), else the last one.
    """
    owned = {name.rpartition(".")[0] for name in axes.parameters}
    found: dict[str, tuple[Place, Place]] = {}
    for run in sorted(_runs(axes), key=lambda run: (run.start, -run.stop)):
        path = run.path
        holds = path in owned or any(name.startswith(f"{path}.") for name in owned)
        if not path or path in found or not holds or run.takes != "tensor" or not run.inputs:
            continue
        out = first_floating(run)
        if out is None or out.shape != run.inputs[0].shape or len(out.shape) < 2:
            continue
        dim = 1 if len(out.shape) > 3 else len(out.shape) - 1
        batch = _batch(axes, axes.modules[path].inputs[0]) if path in axes.modules else None
        batch = None if batch == dim else batch
        one, other = (
            Place(path, path, entering, dim, out.shape[dim], 1, batch) for entering in (True, False)
        )
        found[path] = one, other
    return found


def _runs(axes: AxisMap) -> Iterator[ModuleRun]:
    for trace in axes.traces[:1]:
        yield from trace.runs


def first_floating(run: ModuleRun) -> TensorRef | None:
    """The first floating-point tensor that a module returned."""
    return next((ref for ref in refs_in(run.result) if ref.dtype.is_floating_point), None)
