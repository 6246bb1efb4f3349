"""InsertConv: a new convolution whose gate starts at zero."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from neuroexapt.couple import AxisMap
from neuroexapt.edit.base import Edit
from neuroexapt.edit.branches import BranchSpec
from neuroexapt.edit.doors import ROOT, door_of, neighbour
from neuroexapt.edit.graft import AFTER
from neuroexapt.edit.patch import Insertion, Patch
from neuroexapt.errors import EditError


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
        door = door_of(axes, self.after, "output")
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
