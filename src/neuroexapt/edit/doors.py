"""The tensors that enter and leave a module, as an insertion needs to know them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from neuroexapt.couple import AxisMap, Expr, leaves, size_of
from neuroexapt.edit.graft import HOLD
from neuroexapt.errors import EditError

ROOT = "the whole model"  # how messages call the place ""


@dataclass(frozen=True)
class Door:
    """The tensor at one end of a module: its sizes and the dimension that holds channels."""

    sizes: tuple[int, ...]
    channel: int

    @property
    def channels(self) -> int:
        return self.sizes[self.channel]

    @property
    def space(self) -> tuple[int, ...]:
        """Spatial sizes behind the channel dimension; empty when features come last."""
        return self.sizes[self.channel + 1 :]


def check_module(axes: AxisMap, path: str) -> None:
    """Refuse what is no module of which something could be done.

    Raises:
        UnknownPlaceError: no such module; near names are suggested.
        EditError: a width's name, or the beginning of a skip, whose output nobody reads.
    """
    if path not in axes.modules:
        axes.find(path)  # raises with near names
        raise EditError(
            path or ROOT,
            seen="a width",
            needed="a module path",
            next_step="name the module that makes it",
        )
    if path.rpartition(".")[2].startswith(HOLD):
        raise EditError(
            path,
            seen="the beginning of a skip, whose output nobody reads",
            needed="a module that does something",
            next_step=f"name '{path.rpartition('.')[0]}', whose input it keeps",
        )


def door_of(axes: AxisMap, path: str, end: str) -> Door:
    """The tensor that enters or leaves a module.

    Raises:
        UnknownPlaceError: no such module; near names are suggested.
        EditError: several tensors enter or leave, or no dimension holds channels; or as
            :func:`check_module` says.
    """
    check_module(axes, path)
    module = axes.modules[path]
    tensors = module.inputs if end == "input" else module.outputs
    if len(tensors) != 1:
        raise EditError(
            path or ROOT,
            seen=f"{len(tensors)} tensors as {end}",
            needed=f"one tensor as {end}",
            next_step="choose a module with a single input and output",
        )
    dims = tensors[0]
    return Door(tuple(size_of(expr, {}) for expr in dims), channel_dim(axes, path, dims))


def channel_dim(axes: AxisMap, path: str, dims: Sequence[Expr]) -> int:
    """The dimension behind the batch that holds channels or features.

    The first one that a layer makes and that can change, else one that a layer makes, else one
    that a layer reads.

    Raises:
        EditError: there is none.
    """
    made = [dim for dim, expr in enumerate(dims) if dim and "producer" in _roles(axes, expr)]
    free = [dim for dim in made if any(leaf.name in axes.widths for leaf in leaves(dims[dim]))]
    read = [dim for dim, expr in enumerate(dims) if dim and "consumer" in _roles(axes, expr)]
    for found in (free, made, read):
        if found:
            return found[0]
    raise EditError(
        path or ROOT,
        seen=f"shape {tuple(size_of(expr, {}) for expr in dims)}, no dimension made by a layer",
        needed="a dimension of channels or features",
        next_step="choose a module behind a convolution or linear layer",
    )


def _roles(axes: AxisMap, expr: Expr) -> set[str]:
    entries = [axes.widths.get(leaf.name) or axes.pinned.get(leaf.name) for leaf in leaves(expr)]
    return {role for e in entries if e for place in e.appearances for role in place.roles}


def neighbour(axes: AxisMap, path: str) -> str | None:
    """A parameter beside the module, whose optimizer group the new parameters join.

    The last one inside it, else the last one that stands before it in the model.
    """
    prefix = f"{path}." if path else ""
    inside = [name for name in axes.parameters if name.startswith(prefix)]
    if inside:
        return inside[-1]
    order = list(axes.modules)
    before = set(order[: order.index(path)])
    earlier = [name for name in axes.parameters if name.rpartition(".")[0] in before]
    return next(reversed(earlier or list(axes.parameters)), None)
