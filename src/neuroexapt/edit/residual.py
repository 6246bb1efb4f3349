"""InsertResidual: a skip around a module whose gate starts at zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from neuroexapt.couple import AxisMap
from neuroexapt.edit.base import Edit
from neuroexapt.edit.branches import BranchSpec
from neuroexapt.edit.doors import ROOT, Door, doors, neighbour
from neuroexapt.edit.graft import SKIP
from neuroexapt.edit.patch import Insertion, Patch
from neuroexapt.errors import EditError


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


def _stride(size: int, target: int) -> int | None:
    strides = [s for s in range(1, size + 1) if (size - 1) // s + 1 == target]
    exact = [s for s in strides if size == s * target]
    return next(iter((*exact, *strides)), None)
