"""InsertPool: maps get smaller behind a module, and what reads their positions follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from neuroexapt.capture import TensorRef, Trace
from neuroexapt.couple import Appearance, AxisMap, Expr, leaves, size_of
from neuroexapt.edit.base import Edit
from neuroexapt.edit.branches import Spec
from neuroexapt.edit.doors import ROOT, Door, door_of
from neuroexapt.edit.graft import THEN
from neuroexapt.edit.patch import AttributeEdit, Insertion, Patch, Refold
from neuroexapt.edit.smaller import Dim, Smaller, whole, windowed
from neuroexapt.errors import EditError

_POOLS: Mapping[str, Mapping[int, Any]] = {
    "max": {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d},
    "avg": {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d},
    "global": {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d},
}


@dataclass(frozen=True, kw_only=True)
class PoolSpec(Spec):
    """A pool: ``kind`` over ``spatial`` dimensions, windows of ``stride`` positions."""

    kind: str
    spatial: int
    stride: int

    def make(self, model: nn.Module) -> nn.Module:
        """(N, C, ...) to (N, C, ...), each size divided by the stride and rounded up."""
        make = _POOLS[self.kind][self.spatial]
        # Rounded up, so that no position goes unread.
        pool = make(1) if self.kind == "global" else make(self.stride, ceil_mode=True)
        assert isinstance(pool, nn.Module)
        return pool


@dataclass(frozen=True)
class InsertPool(Edit):
    """A pool behind a module: from there on the maps are smaller.

    Promise: approximate; ``Applied.max_difference`` says how far the outputs moved. A linear layer
    that reads flattened maps further on gets, for each window, the sum of its weights over that
    window; its optimizer state the mean. So an average pool of maps that are constant over each
    window changes nothing, nor does one before a global average pool where windows are full.

    Args:
        after: path of a module that puts out (N, C, ...) with one to three spatial dimensions.
        kind: ``"max"``, ``"avg"``, or ``"global"``, which averages each map to one position.
        stride: size of the windows in each direction; not used by ``"global"``.

    Raises:
        UnknownPlaceError, EditError: from :meth:`plan`; also where the model's output would get
            another shape, and where a smaller map would meet one that stays as large.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from neuroexapt import InsertPool, apply
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 36, 2))
        >>> done = apply(net, InsertPool("0", kind="avg"), args=(torch.randn(5, 3, 6, 6),))
        >>> net[2], done.parameters_before - done.parameters_after
        (Linear(in_features=36, out_features=2, bias=True), 216)

    METHODS: pooling is never exact where resolution matters; the figure says what it costs.
    """

    after: str
    kind: str = "max"
    stride: int = 2

    @property
    def place(self) -> str:
        return self.after

    def check(self, axes: AxisMap) -> list[EditError]:
        """Settings, an output with maps, and everything that reads them further on."""
        try:
            self.plan(axes, {})
        except EditError as error:
            return [error]
        return []

    def plan(self, axes: AxisMap, tensors: Mapping[str, Tensor]) -> Patch:
        """One insertion, the weights it folds, and the numbers that repeat their sizes."""
        door = self._door(axes)
        folds: dict[tuple[str, int], Dim] = {}
        for trace in axes.traces:
            for at, dim in self._folds(axes, trace, door).items():
                folds.setdefault(at, dim)
        spec = PoolSpec(kind=self.kind, spatial=len(door.space), stride=self.stride)
        name = {"avg": "an average", "max": "a max", "global": "a global average"}[self.kind]
        windows = "" if self.kind == "global" else f" over windows of {self.stride}"
        follow = f", folded into {', '.join(name for name, _ in folds)}" if folds else ""
        return Patch(
            self,
            "approximate",
            f"add {name} pool{windows} after '{self.after}'{follow}",
            refolds=tuple(Refold(name, dim, fold.groups) for (name, dim), fold in folds.items()),
            attributes=_attributes(axes, folds),
            insertions=(Insertion(self.after, THEN, spec, None),),
        )

    def _door(self, axes: AxisMap) -> Door:
        stride = self.stride
        if self.kind not in _POOLS or type(stride) is not int or stride < 2:
            raise EditError(
                self.after or ROOT,
                seen=f"kind={self.kind!r}, stride={stride!r}",
                needed=f"a kind out of {', '.join(_POOLS)}, and a whole stride of 2 or more",
                next_step="use kind='max', stride=2",
            )
        door = door_of(axes, self.after, "output")
        if door.channel != 1 or not 1 <= len(door.space) <= 3 or max(door.space) < 2:
            raise EditError(
                self.after or ROOT,
                seen=f"output {door.sizes} with channels in dimension {door.channel}",
                needed="an output (N, C, ...) with one to three spatial dimensions, not all 1",
                next_step="insert behind a convolution, its norm or its activation",
            )
        made = [expr for expr in axes.modules[self.after].outputs[0][2:] if _made(axes, expr)]
        if made:
            raise EditError(
                self.after,
                seen=f"output {door.sizes}, where a layer makes {size_of(made[0], {})} units",
                needed="spatial positions behind the channels",
                next_step="insert behind a convolution",
            )
        return door

    def _folds(self, axes: AxisMap, trace: Trace, door: Door) -> dict[tuple[str, int], Dim]:
        """The weights that follow in one run, by name and dimension."""
        runs = [run for run in trace.runs if run.path == self.after]
        if not runs:
            return {}
        if len(runs) > 1:
            raise EditError(
                self.after or ROOT,
                seen=f"a module that is called {len(runs)} times in one forward",
                needed="one that is called once",
                next_step="choose a module around one of the calls, or behind it",
            )
        (run,) = runs
        out = run.result
        if not isinstance(out, TensorRef):
            raise EditError(
                self.after or ROOT,
                seen=f"a {type(out).__name__} as output",
                needed="one tensor",
                next_step="choose a module that puts out its maps alone",
            )
        strides = [size if self.kind == "global" else self.stride for size in door.space]
        space = [windowed(n, -(-n // s), s) for n, s in zip(door.space, strides, strict=True)]
        dims = (*map(whole, out.shape[:2]), *space)
        smaller = Smaller(self.after or ROOT, trace, {out: dims})
        smaller.follow(run.stop)
        names = {ref: name for name, ref in reversed(list(trace.tensors.items()))}
        folds = {(names[ref], dim): fold for (ref, dim), fold in smaller.folds.items()}
        _check_literals(axes, smaller, folds)
        return folds


def _check_literals(axes: AxisMap, smaller: Smaller, folds: Mapping[tuple[str, int], Dim]) -> None:
    """A flattened size that is written into the forward cannot follow."""
    for call in smaller.flattenings:
        dims = smaller.dims.get(call.outputs[0], ())
        sizes = list(zip(call.args[1], dims, strict=False))
        # With -1 elsewhere, the sizes are those that the forward names.
        written = -1 in call.args[1] and any(
            size == dim.old != dim.new and (1, at) not in call.origins
            for at, (size, dim) in enumerate(sizes)
        )
        # A flattened size that no channel may change is a number in that line.
        pins = [
            pin.reason
            for name, dim in folds
            for leaf in leaves(axes.tensors[name][dim])
            if (pin := axes.pinned.get(leaf.name)) is not None and _is_made(pin.appearances)
        ]
        if written or any(call.source and str(call.source) in reason for reason in pins):
            raise smaller.refusal(
                f"{call.place}, which holds a size as a number", "a size computed from the input"
            )


def _made(axes: AxisMap, expr: Expr) -> bool:
    entries = (axes.widths.get(leaf.name) or axes.pinned.get(leaf.name) for leaf in leaves(expr))
    return any(_is_made(entry.appearances) for entry in entries if entry is not None)


def _is_made(appearances: Iterable[Appearance]) -> bool:
    return any("producer" in place.roles for place in appearances)


def _attributes(axes: AxisMap, folds: Mapping[tuple[str, int], Dim]) -> tuple[AttributeEdit, ...]:
    """The numbers that repeat a folded dimension, such as ``in_features``."""
    found = {}
    for (name, dim), fold in folds.items():
        expr = axes.tensors[name][dim]
        for attribute in axes.attributes:
            if not attribute.is_tuple and attribute.exprs == (expr,):
                edit = AttributeEdit(attribute.module, attribute.name, fold.new)
                found[edit.module, edit.name] = edit
    return tuple(found.values())
