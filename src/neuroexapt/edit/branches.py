"""The modules that insertions add, described as data and built from plain torch.nn parts."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@dataclass(frozen=True)
class Spec(abc.ABC):
    """A module to insert, as data; a subclass a kind of insertion.

    Attributes:
        seed: seed of the random initial weights.
        fresh: whether the module is new, and takes the device, the dtype and the mode of its
            neighbourhood; a copy has its own.
    """

    seed: int = 0
    fresh: ClassVar[bool] = True

    @abc.abstractmethod
    def make(self, model: nn.Module) -> nn.Module:
        """The module, with initial weights drawn from torch's global generator.

        ``model`` is the model that is edited, for specs that copy a part of it.
        """

    def preview(self, model: nn.Module) -> list[Tensor]:
        """The parameters and buffers that the module will have, without their values."""
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            made = self.make(model)
        return [*made.parameters(), *made.buffers()]

    def origin(self, name: str) -> str | None:
        """The model's parameter that a new one copies; it joins the optimizer group of that."""
        return None


def build(spec: Spec, model: nn.Module) -> nn.Module:
    """The module a spec describes, initialised from its own seed; the global random state stays."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(spec.seed)
        return spec.make(model)


@dataclass(frozen=True, kw_only=True)
class BranchSpec(Spec):
    """A branch that is added to a tensor and outputs zeros at first.

    Attributes:
        kind: ``"projection"`` or ``"identity"``.
        source: channels (or features) that enter.
        target: channels (or features) that leave.
        spatial: number of spatial dimensions; 0 when features come last.
        stride: per spatial dimension.
    """

    kind: str
    source: int
    target: int
    spatial: int
    stride: tuple[int, ...] = ()

    def make(self, model: nn.Module) -> nn.Module:
        """Output shape: that of the branch's target."""
        return _BUILDERS[self.kind](self)


class Gate(nn.Module):
    """Multiplies each channel by a learnable scale that starts at zero.

    Args:
        channels: number of channels.
        spatial: number of dimensions behind the channel dimension.

    Example:
        >>> gate = Gate(3, spatial=2)
        >>> gate(torch.ones(2, 3, 4, 4)).abs().sum().item()
        0.0
    """

    def __init__(self, channels: int, spatial: int) -> None:
        super().__init__()
        self.spatial = spatial
        self.scale = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, ...) or (..., C) to the same shape."""
        # In a region of lower precision the stream keeps its dtype.
        return x * self.scale.to(x.dtype).view(-1, *([1] * self.spatial))

    def extra_repr(self) -> str:
        return f"{self.scale.numel()}, spatial={self.spatial}"


def _projection(spec: BranchSpec) -> nn.Module:
    """1x1 convolution and batch norm with zero scale; without space, linear layer and gate."""
    if not spec.spatial:
        return nn.Sequential(nn.Linear(spec.source, spec.target), Gate(spec.target, 0))
    norm = _NORM[spec.spatial](spec.target)
    nn.init.zeros_(norm.weight)
    conv = _CONV[spec.spatial](spec.source, spec.target, 1, stride=spec.stride)  # type: ignore[arg-type]
    return nn.Sequential(conv, norm)


def _identity(spec: BranchSpec) -> nn.Module:
    return Gate(spec.target, spec.spatial)


_BUILDERS = {"projection": _projection, "identity": _identity}
