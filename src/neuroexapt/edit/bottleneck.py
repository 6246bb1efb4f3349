"""ExpandBottleneck: the widths that hold back what enters them grow to what is needed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from torch import Tensor

from neuroexapt.couple import AxisMap
from neuroexapt.edit.base import Edit
from neuroexapt.edit.doors import ROOT
from neuroexapt.edit.patch import Patch
from neuroexapt.edit.widen import stiff, widened
from neuroexapt.errors import EditError


@dataclass(frozen=True)
class Squeeze:
    """What was measured of one width: whether more comes in than it can hold.

    Attributes:
        width: its name.
        size: number of units when it was measured.
        rank: effective rank of its units' activations, in units: how many directions they use.
        entering: effective rank of what the width is made from.
        gain: expected fall of the loss if it were wider, in nats; None if not measured.
        error: standard error of ``gain``.

    Example:
        >>> squeeze = Squeeze("fc1.out", size=4, rank=3.8, entering=15.2)
        >>> round(squeeze.saturation, 2), round(squeeze.lost, 2)
        (0.95, 0.75)
    """

    width: str
    size: int
    rank: float
    entering: float
    gain: float | None = None
    error: float = 0.0

    @property
    def saturation(self) -> float:
        """Share of the units' room that is in use; near 1 the width is full."""
        return self.rank / self.size

    @property
    def lost(self) -> float:
        """Share of the directions that enter and do not pass."""
        return max(0.0, 1 - self.rank / self.entering) if self.entering > 0 else 0.0


@dataclass(frozen=True)
class ExpandBottleneck(Edit):
    """Widen exactly the widths that are squeezed, each to what is needed.

    A width is squeezed if its units are nearly all in use and a good part of the directions that
    enter does not pass. It grows to the effective rank of what enters, at most ``most`` times its
    size. Of two in a row only the first is seen: little enters the second as long as that one is
    narrow.

    Promise: exact, as :class:`Widen`. Readings travel as values: see
    :func:`neuroexapt.train.read_squeezes`, which measures them.

    Args:
        readings: one for each width that may grow.
        saturation: least effective rank beside size of a squeezed width.
        lost: least share of the entering directions that a squeezed width loses.
        significance: ask for a gain as well: more than so many of its standard errors. Not asked
            by default: behind one bottleneck the gradients of another one's new units are noise.
        most: largest size after, beside the size before.

    Raises:
        UnknownPlaceError, EditError: from :meth:`plan`; "no width is squeezed" with the figures.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from neuroexapt import ExpandBottleneck, apply
        >>> from neuroexapt.edit import Squeeze
        >>> net = nn.Sequential(nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 16), nn.Linear(16, 4))
        >>> readings = (Squeeze("0.out", 3, rank=2.9, entering=9.6),
        ...             Squeeze("2.out", 16, rank=2.9, entering=2.9))
        >>> apply(net, ExpandBottleneck(readings), (torch.randn(5, 16),)).description
        'widen 0.out from 3 to 10 (rank 2.9 of 3, 9.6 enter)'

    Roy and Vetterli 2007 for the effective rank; Verbockhaven et al. 2024 (TINY) for the
    expressivity bottleneck.
    """

    readings: tuple[Squeeze, ...]
    saturation: float = 0.7
    lost: float = 0.25
    significance: float | None = None
    most: float = 4.0

    @property
    def place(self) -> str:
        return ", ".join(one.width for one in self.readings if not self.why_not(one))

    def why_not(self, reading: Squeeze) -> str:
        """Why a width is not squeezed; empty if it is."""
        if reading.saturation < self.saturation:
            return f"uses {reading.rank:.1f} of {reading.size} units"
        if reading.lost < self.lost or reading.entering <= reading.size:
            return f"{reading.entering:.1f} enter, {reading.size} units hold them"
        if self.significance is None:
            return ""
        if reading.gain is None or reading.gain <= self.significance * reading.error:
            gain = "an unknown gain" if reading.gain is None else f"{reading.gain:.1e} nats"
            return f"would bring {gain}, error {reading.error:.1e}"
        return ""

    def check(self, axes: AxisMap) -> list[EditError]:
        """Readings of this model, a squeezed width, and one that can grow."""
        problems = self._wrong_numbers() + [
            problem for one in self.readings for problem in _misfit(axes, one)
        ]
        if problems:
            return problems
        squeezed = [one for one in self.readings if not self.why_not(one)]
        if not squeezed:
            return [self._none_squeezed()]
        stuck = [stiff(axes, {}, one.width) for one in squeezed]
        return [problem for problem in stuck if problem] if all(stuck) else []

    def plan(self, axes: AxisMap, tensors: Mapping[str, Tensor]) -> Patch:
        """Every squeezed width that can grow exactly; the description names the others."""
        problems = self.check(axes)
        if problems:
            raise problems[0]
        sizes, told, left = dict[str, int](), list[str](), list[EditError]()
        for one in self.readings:
            if self.why_not(one):
                continue
            problem = stiff(axes, tensors, one.width)
            if problem is not None:
                left.append(problem)
                continue
            sizes[one.width] = self._needed(axes, one)
            told.append(
                f"{one.width} from {one.size} to {sizes[one.width]} "
                f"(rank {one.rank:.1f} of {one.size}, {one.entering:.1f} enter)"
            )
        if not sizes:
            raise left[0]
        steps, attributes = widened(axes, tensors, sizes)
        kept = "".join(f"; '{error.place}' is squeezed and stays: {error.seen}" for error in left)
        return Patch(self, "exact", f"widen {', '.join(told)}{kept}", steps, attributes=attributes)

    def _needed(self, axes: AxisMap, one: Squeeze) -> int:
        multiple = axes.widths[one.width].multiple
        units = max(one.size + 1, min(ceil(one.entering), int(self.most * one.size)))
        return -(-units // multiple) * multiple

    def _wrong_numbers(self) -> list[EditError]:
        good = {
            "saturation": 0 < self.saturation <= 1,
            "lost": 0 <= self.lost < 1,
            "significance": self.significance is None or self.significance >= 0,
            "most": self.most > 1,
            "readings": bool(self.readings),
        }
        return [
            EditError(
                ROOT,
                seen=f"{name}={getattr(self, name)!r}",
                needed="shares from 0 to 1, most above 1, significance of 0 or more, and readings",
                next_step="measure readings with neuroexapt.train.read_squeezes",
            )
            for name, fine in good.items()
            if not fine
        ]

    def _none_squeezed(self) -> EditError:
        figures = "; ".join(f"'{one.width}' {self.why_not(one)}" for one in self.readings)
        return EditError(
            ROOT,
            seen=f"no width is squeezed: {figures}",
            needed=f"a width with rank of {self.saturation:.0%} of its size or more that loses "
            f"{self.lost:.0%} or more of what enters",
            next_step="leave the widths as they are, or use IncreaseCapacity for more of all",
        )


def _misfit(axes: AxisMap, one: Squeeze) -> list[EditError]:
    """Readings of a width that is not there, or was measured at another size."""
    width = axes.widths.get(one.width)
    if width is None:
        try:
            axes.one(one.width)
        except EditError as error:
            return [error]
    if width is not None and width.size == one.size:
        return []
    return [
        EditError(
            one.width,
            seen=f"a reading of {one.size} units",
            needed=f"one of the width as it is now ({width.size})" if width else "a width's name",
            next_step="measure again: the model has changed since",
        )
    ]
