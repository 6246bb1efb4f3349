"""A change that could be made, with what it is expected to bring and to cost."""

from __future__ import annotations

from dataclasses import dataclass

from neuroexapt.edit import Edit
from neuroexapt.measure import Reading


@dataclass(frozen=True)
class Candidate:
    """A change that could be made.

    Attributes:
        edit: what to do.
        also: what goes with it, one after the other; kept or taken back together.
        loss: expected change of the loss in nats; negative is better.
        error: standard error of ``loss``.
        parameters: change of the number of parameters.
        flops: change of the FLOPs of one sample.
        readings: the signals behind it.
        reason: one sentence for people.
        first: comes before every candidate that is not, whatever their utilities.
        watched: keeps the function and can be undone at any time, so that it needs no trial.
    """

    edit: Edit
    loss: float
    error: float
    parameters: int
    flops: int
    readings: tuple[Reading, ...]
    reason: str
    also: tuple[Edit, ...] = ()
    first: bool = False
    watched: bool = False

    @property
    def edits(self) -> tuple[Edit, ...]:
        """All of them, in order."""
        return (self.edit, *self.also)

    @property
    def kind(self) -> str:
        return type(self.edit).__name__

    @property
    def key(self) -> str:
        """What a verdict about it is remembered under."""
        to = getattr(self.edit, "to", None) or getattr(self.edit, "strength", None)
        name = f"{self.kind} {self.edit.place}" + (f" to {to:g}" if to is not None else "")
        return name + (f" and {len(self.also)} more" if self.also else "")
