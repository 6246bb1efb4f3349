"""What was measured at one moment, as values: the only thing that proposals are made from."""

from __future__ import annotations

from dataclasses import dataclass

from neuroexapt.edit import Edit
from neuroexapt.measure import Reading
from neuroexapt.plan.fitting import Fitting


@dataclass(frozen=True)
class ShrinkOption:
    """A smaller size of a width and what it would save (changes are negative)."""

    to: int
    parameters: int
    flops: int


@dataclass(frozen=True)
class WidthSurvey:
    """One width: what each unit is worth, and what smaller sizes would save.

    Attributes:
        name: the width.
        size: present number of units.
        removal: expected loss increase, in nats, of removing each unit by itself.
        error: standard errors of ``removal``.
        readings: signals about the width, for the record.
        shrink: smaller sizes.
        unit: its size must stay a multiple of this.
        least: the fewest units it may have.
        chances: modules that drop units of it at random: path, probability.
    """

    name: str
    size: int
    removal: tuple[float, ...]
    error: tuple[float, ...]
    readings: tuple[Reading, ...]
    shrink: tuple[ShrinkOption, ...]
    unit: int = 1
    least: int = 1
    chances: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class SqueezeOption:
    """New sizes of several widths, and what they would save together."""

    sizes: tuple[tuple[str, int], ...]
    parameters: int
    flops: int


@dataclass(frozen=True)
class GrowOption:
    """An edit that adds parameters, with the loss decrease its gradients promise.

    Attributes:
        edit: the edit.
        gain: expected decrease of the loss in nats (block natural score).
        error: its standard error.
        parameters: parameters it adds.
        flops: FLOPs a sample it adds.
        readings: signals behind it.
    """

    edit: Edit
    gain: float
    error: float
    parameters: int
    flops: int
    readings: tuple[Reading, ...]


@dataclass(frozen=True)
class Survey:
    """The model at one moment."""

    parameters: int
    flops: int
    widths: tuple[WidthSurvey, ...]
    grow: tuple[GrowOption, ...]
    squeeze: tuple[SqueezeOption, ...] = ()
    fitting: Fitting | None = None

    @property
    def readings(self) -> list[Reading]:
        """Every signal taken, for the record."""
        taken = [reading for width in self.widths for reading in width.readings]
        taken += [reading for option in self.grow for reading in option.readings]
        return taken + ([] if self.fitting is None else [self.fitting.gap, self.fitting.chance])
