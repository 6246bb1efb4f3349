"""InsertAttention: gates and attention that start as the identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from neuroexapt.couple import AxisMap
from neuroexapt.edit.base import Edit
from neuroexapt.edit.branches import Spec
from neuroexapt.edit.doors import ROOT, neighbour
from neuroexapt.edit.gates import (
    ConvBlockAttention,
    SelfAttention,
    SpatialGate,
    SqueezeExcite,
    squeezed,
)
from neuroexapt.edit.graft import AFTER, THEN
from neuroexapt.edit.patch import Insertion, Patch
from neuroexapt.edit.places import Output, batch_first, output_of
from neuroexapt.errors import EditError

KINDS = ("squeeze_excite", "spatial", "cbam", "self")
MOST_POSITIONS = 1024


@dataclass(frozen=True, kw_only=True)
class AttentionSpec(Spec):
    """An attention module, see :mod:`neuroexapt.edit.gates`.

    Attributes:
        kind: one of ``KINDS``.
        channels: channels of the tensor it works on.
        channel: the dimension that holds them.
        hidden: units of the squeeze, or heads.
        spatial: number of dimensions behind the channels.
        kernel: size of a convolution over places.
        causal: whether positions see earlier ones alone.
    """

    kind: str
    channels: int
    channel: int
    hidden: int
    spatial: int
    kernel: int
    causal: bool

    def make(self, model: nn.Module) -> nn.Module:
        """The same shape in and out."""
        if self.kind == "squeeze_excite":
            return SqueezeExcite(self.channels, self.hidden, self.channel)
        if self.kind == "self":
            return SelfAttention(self.channels, self.hidden, self.channel, self.causal)
        kind = SpatialGate if self.kind == "spatial" else ConvBlockAttention
        return kind(self.channels, self.hidden, self.spatial, self.kernel)


@dataclass(frozen=True)
class InsertAttention(Edit):
    """Attention behind a module, which starts as the identity.

    ========================== ===================================================================
    ``kind="squeeze_excite"``  a gate a channel, from the mean over positions (Hu et al. 2018)
    ``kind="spatial"``         a gate a place, from a learned squeeze (Park et al. 2018, BAM)
    ``kind="cbam"``            both, from mean and maximum (Woo et al. 2018, CBAM)
    ``kind="self"``            ``y + out(attention(y))``, multi-head, over positions (Wang et al.
                               2018 on maps)
    ========================== ===================================================================

    Promise: exact, in evaluation and in training mode: the last layer starts at zero, so a gate
    ``2 sigmoid(0)`` is one and the attention adds nothing. That layer learns from the first
    step, the layers before it from the second.

    Along a sequence every kind but a causal ``"self"`` lets a position see later ones, so
    ``causal`` must be said there. Self-attention sees the positions of one call: padding is not
    masked, and there is no cache of keys and values.

    Args:
        after: path of a module whose output is (N, C, ...) or (N, ..., C), samples first; of a
            tuple the first item.
        kind: see above.
        reduction: channels to one hidden unit of a squeeze; at least four units are made.
        heads: heads of ``"self"``; they divide the channels.
        causal: whether a position must not see later ones; needed where positions are a sequence.
        kernel: odd size of the convolution over places.
        most_positions: more positions than this are refused for ``"self"``, whose cost is their
            square.
        seed: seed of the random weights.

    Raises:
        UnknownPlaceError, EditError: from :meth:`plan`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from neuroexapt import InsertAttention, apply
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
        >>> images = torch.randn(2, 3, 8, 8)
        >>> done = apply(net, InsertAttention("1"), args=(images,))
        >>> done = apply(net, InsertAttention("1", kind="self", heads=2), args=(images,))
        >>> list(dict(net[1].named_children())), done.max_difference
        (['nx_then', 'nx_after'], 0.0)
    """

    after: str
    kind: str = "squeeze_excite"
    reduction: int = 16
    heads: int = 4
    causal: bool | None = None
    kernel: int = 7
    most_positions: int = MOST_POSITIONS
    seed: int = 0

    @property
    def place(self) -> str:
        return self.after

    def check(self, axes: AxisMap) -> list[EditError]:
        """Wrong options; a place without positions; sequences; too many positions."""
        problems = self._wrong_options()
        try:
            output = output_of(axes, self.after)
        except EditError as error:
            return [*problems, error]
        return [*problems, *self._unfit(axes, output)]

    def plan(self, axes: AxisMap, tensors: Mapping[str, Tensor]) -> Patch:
        """One insertion under a reserved name."""
        problems = self.check(axes)
        if problems:
            raise problems[0]
        output = output_of(axes, self.after)
        attends = self.kind == "self"
        spec = AttentionSpec(
            kind=self.kind,
            channels=output.channels,
            channel=output.channel,
            hidden=self.heads if attends else squeezed(output.channels, self.reduction),
            spatial=len(output.space),
            kernel=self.kernel,
            causal=bool(self.causal),
            seed=self.seed,
        )
        insertion = Insertion(
            self.after,
            AFTER if attends else THEN,
            spec,
            neighbour(axes, self.after),
            dtype=output.dtype,
        )
        text = f"add {self.kind} attention after '{self.after}'"
        return Patch(self, "exact", text, insertions=(insertion,))

    def _wrong_options(self) -> list[EditError]:
        problems = []
        if self.kind not in KINDS:
            problems.append(self._error(f"kind={self.kind!r}", f"one of {KINDS}", "choose one"))
        for name in ("reduction", "heads", "kernel", "most_positions"):
            value = getattr(self, name)
            if type(value) is not int or value < 1 or (name == "kernel" and value % 2 == 0):
                odd = "odd, " if name == "kernel" else ""
                problems.append(
                    self._error(f"{name}={value!r}", f"a whole number, {odd}at least 1", "use one")
                )
        return problems

    def _unfit(self, axes: AxisMap, output: Output) -> list[EditError]:
        """What stands against this kind at this place."""
        if not batch_first(axes, output):
            return [
                self._error(
                    f"output {output.sizes}, whose first dimension is not known to be the batch",
                    "samples along the first dimension, as in the model's first input",
                    "choose a module that puts out samples first; attention would mix them",
                )
            ]
        if not output.positions or output.channel not in (1, len(output.sizes) - 1):
            return [
                self._error(
                    f"output {output.sizes} with channels in dimension {output.channel}",
                    "positions behind the channels, or between batch and features",
                    "choose a module with a map or a sequence as output",
                )
            ]
        fits = self._fits_sequence(axes, output) if len(output.positions) == 1 else []
        if self.kind in ("spatial", "cbam") and not 1 <= len(output.space) <= 3:
            fits.append(
                self._error(
                    f"output {output.sizes}, features last",
                    "one to three spatial dimensions behind the channels",
                    "use kind='squeeze_excite' or kind='self'",
                )
            )
        return fits + (self._fits_heads(output) if self.kind == "self" else [])

    def _fits_sequence(self, axes: AxisMap, output: Output) -> list[EditError]:
        if self.causal is None:
            return [
                self._error(
                    f"a sequence of {output.positions[0]} positions, and causal=None",
                    "to know whether a position may see later ones",
                    "say causal=True for a model that predicts what comes next, else causal=False",
                )
            ]
        if self.causal and self.kind != "self":
            return [
                self._error(
                    f"kind={self.kind!r} and causal=True",
                    "attention that can leave out later positions",
                    "use kind='self'",
                )
            ]
        if self.causal and any(stack.totals for stack in axes.stacks):
            return [
                self._error(
                    "a model whose layers have places in a cache of keys and values",
                    "a place in it for this attention",
                    "use InsertLayer(kind='copy') on a layer: its copy gets one",
                )
            ]
        return []

    def _fits_heads(self, output: Output) -> list[EditError]:
        problems = []
        if output.channels % max(1, self.heads):
            fitting = [n for n in range(1, output.channels + 1) if output.channels % n == 0]
            problems.append(
                self._error(
                    f"heads={self.heads} on {output.channels} channels",
                    f"one of {fitting}",
                    f"use heads={max(n for n in fitting if n <= self.heads)}",
                )
            )
        count = prod(output.positions)
        if count > self.most_positions:
            cost = 2 * count**2 * output.channels
            problems.append(
                self._error(
                    f"{count} positions, which cost {cost:.0e} multiplications a sample",
                    f"at most {self.most_positions}",
                    f"insert behind a module with less space, or say most_positions={count}",
                )
            )
        return problems

    def _error(self, seen: str, needed: str, next_step: str) -> EditError:
        return EditError(self.after or ROOT, seen=seen, needed=needed, next_step=next_step)
