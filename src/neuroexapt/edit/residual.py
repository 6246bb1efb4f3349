"""InsertResidual: a skip around one module or several, whose gate starts at zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from neuroexapt.couple import AxisMap, size_of
from neuroexapt.edit.base import Edit
from neuroexapt.edit.branches import BranchSpec
from neuroexapt.edit.doors import ROOT, Door, channel_dim, door_of, neighbour
from neuroexapt.edit.graft import HOLD, JOIN, SKIP
from neuroexapt.edit.hold import HoldSpec, JoinSpec
from neuroexapt.edit.patch import Insertion, Patch
from neuroexapt.edit.places import check_called, output_of, runs_of
from neuroexapt.errors import EditError


@dataclass(frozen=True)
class InsertResidual(Edit):
    """A skip around a module, or around all from one to another: ``y = f(x) + gate * project(x)``.

    Promise: exact, in evaluation and in training mode, because the gate starts at zero. The
    skip is the identity with one learnable gate a channel where input and output have one
    shape; else a 1x1 convolution (a linear layer where features come last) with the stride the
    map gives, and a batch norm whose scale is the gate.

    With ``to`` the skip runs from the input of ``span`` to the output of ``to``, wherever both
    stand: neighbours in a list, or places in the user's own code. Each must run once a forward,
    ``span`` first. No wrapper, no renaming; between both the input is kept alive.

    Args:
        span: path of a module with one tensor input (and output, without ``to``).
        to: path of the module at whose output the skip ends; by default ``span`` itself.
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
        >>> apply(net, InsertResidual("0.0", to="0.1"), (torch.randn(2, 3, 8, 8),)).description
        "add a residual connection from '0.0' to '0.1'"

    He et al. 2016; zero gate as in Bachlechner et al. 2021 (ReZero) and Goyal et al. 2017.
    """

    span: str
    to: str | None = None
    seed: int = 0

    @property
    def place(self) -> str:
        return self.span

    @property
    def _end(self) -> str:
        return self.span if self.to is None else self.to

    def check(self, axes: AxisMap) -> list[EditError]:
        """One tensor in and out, of shapes that a strided projection can join."""
        try:
            self._spec(axes)
        except EditError as error:
            return [error]
        return []

    def plan(self, axes: AxisMap, tensors: Mapping[str, Tensor]) -> Patch:
        """One insertion under a reserved name, or one at either end."""
        spec, near = self._spec(axes), neighbour(axes, self._end)
        if self._end == self.span:
            text = f"add a residual connection around '{self.span}'"
            return Patch(self, "exact", text, insertions=(Insertion(self.span, SKIP, spec, near),))
        join = JoinSpec(first=self.span, branch=spec, seed=self.seed)
        ends = (
            Insertion(self.span, HOLD, HoldSpec(), None),
            Insertion(self._end, JOIN, join, near),
        )
        text = f"add a residual connection from '{self.span}' to '{self._end}'"
        return Patch(self, "exact", text, insertions=ends)

    def _spec(self, axes: AxisMap) -> BranchSpec:
        source, target = _entry(axes, self.span), _exit(axes, self._end)
        if self._end != self.span:
            _check_order(axes, self.span, self._end)
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
        leading = source.sizes[: source.channel], target.sizes[: target.channel]
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


def _entry(axes: AxisMap, path: str) -> Door:
    """What enters a module: its first positional input, whatever else it takes."""
    runs = runs_of(axes, path)
    check_called(axes, path)
    if any(run.takes != "tensor" for run in runs):
        return door_of(axes, path, "input")
    dims = axes.modules[path].inputs[0]
    return Door(tuple(size_of(expr, {}) for expr in dims), channel_dim(axes, path, dims))


def _exit(axes: AxisMap, path: str) -> Door:
    output = output_of(axes, path)
    return Door(output.sizes, output.channel)


def _check_order(axes: AxisMap, first: str, last: str) -> None:
    """Both ends run once a forward, the first before the last is done.

    Raises:
        EditError: they do not; what is kept for the end would be another run's, or nothing.
    """
    for trace in axes.traces:
        done = [run.path for run in trace.runs if run.path in (first, last)]
        nested = (
            first.startswith(f"{last}.") or last.startswith(f"{first}.") or not (first and last)
        )
        if sorted(done) != sorted((first, last)):
            counts = ", ".join(f"'{path}' {done.count(path)} times" for path in (first, last))
            raise _misordered(first, f"{counts} in one forward", "two modules that run once each")
        if done != [first, last] and not nested:
            raise _misordered(first, f"'{last}' before '{first}'", "the first end to run first")


def _misordered(first: str, seen: str, needed: str) -> EditError:
    return EditError(
        first or ROOT,
        seen=seen,
        needed=needed,
        next_step="choose ends that each forward passes once, in this order",
    )


def _stride(size: int, target: int) -> int | None:
    strides = [s for s in range(1, size + 1) if (size - 1) // s + 1 == target]
    exact = [s for s in strides if size == s * target]
    return next(iter((*exact, *strides)), None)
