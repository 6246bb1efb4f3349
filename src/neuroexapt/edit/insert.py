"""InsertConv: a new convolution that leaves the function as it is."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neuroexapt.capture import Call
from neuroexapt.couple import AxisMap
from neuroexapt.edit.base import Edit
from neuroexapt.edit.branches import Gate, Spec
from neuroexapt.edit.doors import ROOT, neighbour
from neuroexapt.edit.graft import AFTER, THEN
from neuroexapt.edit.patch import Insertion, Patch
from neuroexapt.edit.places import Output, makers_of, output_of
from neuroexapt.errors import EditError

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MODES = ("residual", "identity")
# Operators that change nothing when they are applied twice, and what they are as a module.
_IDEMPOTENT = ("aten.relu", "aten.relu_", "aten.hardtanh", "aten.hardtanh_")
_CURVED = re.compile(
    r"aten\.(gelu|silu|sigmoid|tanh|elu|leaky_relu|mish|hardswish|hardsigmoid|softplus|celu"
    r"|log_sigmoid_forward|_softmax|_prelu_kernel|rrelu_with_noise|softshrink|hardshrink)_?"
)


@dataclass(frozen=True, kw_only=True)
class ConvSpec(Spec):
    """A convolution from some channels to as many.

    Attributes:
        mode: ``"residual"`` (convolution, batch norm, ReLU, and a gate that starts at zero) or
            ``"identity"`` (a convolution that starts as the identity).
        channels: channels that enter and leave.
        spatial: number of spatial dimensions.
        kernel: odd kernel size.
        groups: groups of channels.
        bias: whether the convolution has a bias.
        bounds: the activation behind an identity: the values it cuts off at.
    """

    mode: str
    channels: int
    spatial: int
    kernel: int = 3
    groups: int = 1
    bias: bool = False
    bounds: tuple[float, float] | None = None

    def make(self, model: nn.Module) -> nn.Module:
        """(N, C, ...) to the same shape."""
        conv = _CONV[self.spatial](
            self.channels,
            self.channels,
            self.kernel,
            padding=self.kernel // 2,
            groups=self.groups,
            bias=self.bias,
        )
        if self.mode == "identity":
            nn.init.dirac_(conv.weight, self.groups)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
            return nn.Sequential(conv, *self._activation())
        # The gate alone is zero, so that once it has moved every layer of the branch learns.
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        norm = _NORM[self.spatial](self.channels)
        return nn.Sequential(conv, norm, nn.ReLU(), Gate(self.channels, self.spatial))

    def _activation(self) -> list[nn.Module]:
        if self.bounds is None:
            return []
        low, high = self.bounds
        return [nn.ReLU() if (low, high) == (0.0, torch.inf) else nn.Hardtanh(low, high)]


@dataclass(frozen=True)
class InsertConv(Edit):
    """A new convolution behind a module: ``y + gate * relu(norm(conv(y)))``.

    Promise: exact, in evaluation and in training mode. The gate (one scale a channel) starts at
    zero; with ``mode="identity"`` the output goes through the convolution itself, which starts as
    the identity: behind an activation that changes nothing when it is applied twice (ReLU, ReLU6),
    which then follows it once more, or behind a layer, where it is linear. It has no norm, whose
    batch statistics would change the function. The user's forward and every name stay as they are.

    The convolution is centred: in a model over time it sees ``kernel // 2`` steps ahead.

    Args:
        after: path of a module whose output has channels and space: (N, C, ...), with one to
            three spatial dimensions; of a tuple the first item.
        kernel: odd kernel size.
        seed: seed of the random weights.
        mode: ``"residual"`` or ``"identity"``.
        groups: groups of channels that do not see each other.
        depthwise: a group for each channel.
        bias: whether the convolution has a bias.

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

    Identity: Chen et al. 2016 (Net2Net). Zero gate: Bachlechner et al. 2021 (ReZero), per channel.
    """

    after: str
    kernel: int = 3
    seed: int = 0
    mode: str = "residual"
    groups: int = 1
    depthwise: bool = False
    bias: bool = False

    @property
    def place(self) -> str:
        return self.after

    def check(self, axes: AxisMap) -> list[EditError]:
        """Wrong options, and an output without space behind its channels."""
        problems = self._wrong_options()
        try:
            output = output_of(axes, self.after)
        except EditError as error:
            return [*problems, error]
        if not 1 <= len(output.space) <= 3:
            problems.append(self._no_space(output))
        elif self._groups(output) and output.channels % self._groups(output):
            problems.append(
                self._error(
                    f"{self.groups} groups of {output.channels} channels",
                    "groups of one size",
                    "use groups=1, or depthwise=True",
                )
            )
        if self.mode == "identity":
            problems.extend(self._not_idempotent(axes))
        return problems

    def plan(self, axes: AxisMap, tensors: Mapping[str, Tensor]) -> Patch:
        """One insertion under a reserved name."""
        problems = self.check(axes)
        if problems:
            raise problems[0]
        output = output_of(axes, self.after)
        identity = self.mode == "identity"
        spec = ConvSpec(
            mode=self.mode,
            channels=output.channels,
            spatial=len(output.space),
            kernel=self.kernel,
            groups=self._groups(output),
            bias=self.bias,
            bounds=_bounds(makers_of(axes, self.after)) if identity else None,
            seed=self.seed,
        )
        child = THEN if identity else AFTER
        insertion = Insertion(
            self.after, child, spec, neighbour(axes, self.after), dtype=output.dtype
        )
        text = f"add a {self.kernel}-wide convolution after '{self.after}'"
        return Patch(self, "exact", text, insertions=(insertion,))

    def _groups(self, output: Output) -> int:
        return output.channels if self.depthwise else self.groups

    def _wrong_options(self) -> list[EditError]:
        problems = []
        if type(self.kernel) is not int or self.kernel < 1 or self.kernel % 2 == 0:
            problems.append(
                self._error(
                    f"kernel={self.kernel!r}",
                    "an odd kernel size, so that the output keeps its size",
                    "use kernel=3",
                )
            )
        if self.mode not in MODES:
            problems.append(
                self._error(f"mode={self.mode!r}", f"one of {MODES}", "use mode='residual'")
            )
        if type(self.groups) is not int or self.groups < 1:
            problems.append(
                self._error(f"groups={self.groups!r}", "a positive whole number", "use groups=1")
            )
        elif self.depthwise and self.groups != 1:
            problems.append(
                self._error(
                    f"groups={self.groups} and depthwise=True", "one of both", "leave one out"
                )
            )
        return problems

    def _no_space(self, output: Output) -> EditError:
        return self._error(
            f"output {output.sizes} with channels in dimension {output.channel}",
            "an output (N, C, ...) with one to three spatial dimensions",
            "insert behind a convolution, its norm or its activation; for features that come "
            "last use InsertLayer",
        )

    def _not_idempotent(self, axes: AxisMap) -> list[EditError]:
        found = sorted({call.op for call in makers_of(axes, self.after)})
        if len(found) == 1 and not _CURVED.fullmatch(found[0]):
            return []
        return [
            self._error(
                f"an output made by {' and '.join(found) or 'no operator of its own'}",
                "a layer's output, or an activation that changes nothing when applied twice",
                "use mode='residual'",
            )
        ]

    def _error(self, seen: str, needed: str, next_step: str) -> EditError:
        return EditError(self.after or ROOT, seen=seen, needed=needed, next_step=next_step)


def _bounds(makers: list[Call]) -> tuple[float, float] | None:
    """Where the activation that made an output cuts off; none if there is none."""
    if not makers or makers[0].op not in _IDEMPOTENT:
        return None
    if makers[0].op.startswith("aten.relu"):
        return 0.0, torch.inf
    limits = makers[0].args[1:3]
    return float(limits[0]), float(limits[1])
