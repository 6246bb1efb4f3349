"""InsertConv and InsertResidual: new layers whose gate starts at zero."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from neuroexapt.couple import AxisMap, Expr, leaves, size_of
from neuroexapt.edit.base import Edit
from neuroexapt.edit.branches import BranchSpec
from neuroexapt.edit.graft import AFTER, SKIP
from neuroexapt.edit.patch import Insertion, Patch
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


@dataclass(frozen=True)
class InsertResidual(Edit):
    """A skip around a module: ``y = f(x) + gate * project(x)``.

    Promise: exact, in evaluation and in training mode, because the gate starts at zero. The
    skip is the identity with one learnable gate a channel where input and output have one
    shape; else a 1x1 convolution (a linear layer where features come last) with the stride the
    map gives, and a batch norm whose scale is the gate.

    Args:
        span: path of a module with one tensor input and one tensor output.
        seed: seed of the projection's random weights.

    Raises:
        UnknownPlaceError, EditError: from :meth:`plan`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from neuroexapt import InsertResidual, apply
        >>> net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(2)))
        >>> done = apply(net, InsertResidual("0"), args=(torch.randn(2, 3, 8, 8),))
        >>> convolution, norm = net[0].nx_skip
        >>> convolution, norm.num_features
        (Conv2d(3, 8, kernel_size=(1, 1), stride=(2, 2)), 8)

    He et al. 2016; zero gate as in Bachlechner et al. 2021 (ReZero) and Goyal et al. 2017.
    """

    span: str
    seed: int = 0

    @property
    def place(self) -> str:
        return self.span

    def check(self, axes: AxisMap) -> list[EditError]:
        """One tensor in and out, of shapes that a strided projection can join."""
        try:
            self._spec(axes)
        except EditError as error:
            return [error]
        return []

    def plan(self, axes: AxisMap, tensors: Mapping[str, Tensor]) -> Patch:
        """One insertion under a reserved name."""
        spec = self._spec(axes)
        insertion = Insertion(self.span, SKIP, spec, neighbour(axes, self.span))
        return Patch(
            self,
            "exact",
            f"add a residual connection around '{self.span}'",
            insertions=(insertion,),
        )

    def _spec(self, axes: AxisMap) -> BranchSpec:
        source, target = doors(axes, self.span)
        if source == target:
            spatial = len(target.space)
            return BranchSpec(
                kind="identity",
                source=source.channels,
                target=target.channels,
                spatial=spatial,
            )
        stride = self._stride(source, target)
        return BranchSpec(
            kind="projection",
            source=source.channels,
            target=target.channels,
            spatial=len(target.space),
            stride=stride,
            seed=self.seed,
        )

    def _stride(self, source: Door, target: Door) -> tuple[int, ...]:
        """Strides s with (n - 1) // s + 1 == m in every spatial dimension."""
        leading = source.sizes[1 : source.channel], target.sizes[1 : target.channel]
        same_rank = len(source.sizes) == len(target.sizes)
        if same_rank and source.channel == target.channel and leading[0] == leading[1]:
            strides = [_stride(n, m) for n, m in zip(source.space, target.space, strict=True)]
            if all(strides):
                return tuple(s for s in strides if s)
        raise EditError(
            self.span or ROOT,
            seen=f"input {source.sizes}, output {target.sizes}",
            needed="an output that a strided 1x1 projection of the input can reach",
            next_step="choose a span whose spatial sizes divide, one without flatten or reshape",
        )


@dataclass(frozen=True)
class InsertConv(Edit):
    """A new convolution behind a module: ``y + gate * relu(norm(conv(y)))``.

    Promise: exact, in evaluation and in training mode, because the gate (one scale a channel)
    starts at zero. The user's forward and every name stay as they are.

    Args:
        after: path of a module whose output has channels and space: (N, C, ...).
        kernel: odd kernel size.
        seed: seed of the random weights.

    Raises:
        UnknownPlaceError, EditError: from :meth:`plan`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from neuroexapt import InsertConv, apply
        >>> net = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Conv1d(4, 1, 3))
        >>> done = apply(net, InsertConv("1"), args=(torch.randn(3, 2, 9),))
        >>> len(net), done.parameters_after - done.parameters_before, done.max_difference
        (3, 60, 0.0)
    """

    after: str
    kernel: int = 3
    seed: int = 0

    @property
    def place(self) -> str:
        return self.after

    def check(self, axes: AxisMap) -> list[EditError]:
        """An output with space behind its channels, and an odd kernel."""
        try:
            self._spec(axes)
        except EditError as error:
            return [error]
        return []

    def plan(self, axes: AxisMap, tensors: Mapping[str, Tensor]) -> Patch:
        """One insertion under a reserved name."""
        insertion = Insertion(self.after, AFTER, self._spec(axes), neighbour(axes, self.after))
        text = f"add a {self.kernel}-wide convolution after '{self.after}'"
        return Patch(self, "exact", text, insertions=(insertion,))

    def _spec(self, axes: AxisMap) -> BranchSpec:
        if type(self.kernel) is not int or self.kernel < 1 or self.kernel % 2 == 0:
            raise EditError(
                self.after or ROOT,
                seen=f"kernel={self.kernel!r}",
                needed="an odd kernel size, so that the output keeps its size",
                next_step="use kernel=3",
            )
        door = _door(axes, self.after, "output")
        if not 1 <= len(door.space) <= 3:
            raise EditError(
                self.after or ROOT,
                seen=f"output {door.sizes} with channels in dimension {door.channel}",
                needed="an output (N, C, ...) with one to three spatial dimensions",
                next_step="insert behind a convolution, its norm or its activation",
            )
        spatial = len(door.space)
        return BranchSpec(
            kind="conv",
            source=door.channels,
            target=door.channels,
            spatial=spatial,
            kernel=self.kernel,
            seed=self.seed,
        )


def _stride(size: int, target: int) -> int | None:
    strides = [s for s in range(1, size + 1) if (size - 1) // s + 1 == target]
    exact = [s for s in strides if size == s * target]
    return next(iter((*exact, *strides)), None)


def doors(axes: AxisMap, path: str) -> tuple[Door, Door]:
    """Input and output of a module.

    Raises:
        UnknownPlaceError: no such module; near names are suggested.
        EditError: several tensors enter or leave, or no dimension holds channels.
    """
    return _door(axes, path, "input"), _door(axes, path, "output")


def _door(axes: AxisMap, path: str, end: str) -> Door:
    if path not in axes.modules:
        axes.find(path)  # raises with near names
        raise EditError(
            path or ROOT,
            seen="a width",
            needed="a module path",
            next_step="name the module that makes it",
        )
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
    return Door(tuple(size_of(expr, {}) for expr in dims), _channel_dim(axes, path, dims))


def _channel_dim(axes: AxisMap, path: str, dims: Sequence[Expr]) -> int:
    """The first dimension behind the batch that a layer makes, else one that a layer reads."""
    for role in ("producer", "consumer"):
        for dim, expr in enumerate(dims):
            if dim and any(role in _roles(axes, leaf.name) for leaf in leaves(expr)):
                return dim
    raise EditError(
        path or ROOT,
        seen=f"shape {tuple(size_of(expr, {}) for expr in dims)}, no dimension made by a layer",
        needed="a dimension of channels or features",
        next_step="choose a module behind a convolution or linear layer",
    )


def _roles(axes: AxisMap, name: str) -> set[str]:
    entry = axes.widths.get(name) or axes.pinned.get(name)
    if entry is None:
        return set()
    return {role for place in entry.appearances for role in place.roles}


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
