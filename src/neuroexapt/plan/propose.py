"""Turn a survey into candidates, all in one currency: expected change of the loss, and cost."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import sqrt

from neuroexapt.edit import Edit, Narrow
from neuroexapt.measure import Reading
from neuroexapt.plan.survey import GrowOption, ShrinkOption, Survey, WidthSurvey

# Units bring less the more there are: the next one is expected to be worth half of the last.
_HALF = 0.5


@dataclass(frozen=True)
class Candidate:
    """A change that could be made.

    Attributes:
        edit: what to do.
        loss: expected change of the loss in nats; negative is better.
        error: standard error of ``loss``.
        parameters: change of the number of parameters.
        flops: change of the FLOPs of one sample.
        readings: the signals behind it.
        reason: one sentence for people.
    """

    edit: Edit
    loss: float
    error: float
    parameters: int
    flops: int
    readings: tuple[Reading, ...]
    reason: str

    @property
    def kind(self) -> str:
        return type(self.edit).__name__

    @property
    def key(self) -> str:
        """What a verdict about it is remembered under."""
        return f"{self.kind} {self.edit.place}"


def propose(survey: Survey) -> list[Candidate]:
    """Every candidate of a survey: each smaller size of each width, and every growth."""
    shrinking = [c for width in survey.widths for c in _narrowings(width)]
    by_name = {width.name: width for width in survey.widths}
    growing = [_growth(option, by_name.get(option.edit.place)) for option in survey.grow]
    return [*shrinking, *growing]


def _narrowings(width: WidthSurvey) -> Iterator[Candidate]:
    order = sorted(range(width.size), key=lambda unit: width.removal[unit])
    for option in width.shrink:
        removed = order[: width.size - option.to]
        yield _narrowing(width, option, removed)


def _narrowing(width: WidthSurvey, option: ShrinkOption, removed: list[int]) -> Candidate:
    loss = sum(width.removal[unit] for unit in removed)
    error = sqrt(sum(width.error[unit] ** 2 for unit in removed))
    edit = Narrow(width.name, to=option.to, scores={width.name: width.removal})
    reason = (
        f"the {len(removed)} least needed of {width.size} units of '{width.name}' are expected "
        f"to cost {loss:.4f} nats together and hold {-option.parameters:,} parameters"
    )
    reading = Reading("removal_loss", width.name, loss, "nats", error, len(removed))
    return Candidate(
        edit, loss, error, option.parameters, option.flops, (reading, *width.readings), reason
    )


def _growth(option: GrowOption, width: WidthSurvey | None) -> Candidate:
    """The gain its gradients promise; for a width, what its saturation says as well."""
    gain, error, readings = option.gain, option.error, option.readings
    reason = (
        f"gradients on the new weights at '{option.edit.place}' promise {gain:.4f} nats for "
        f"{option.parameters:,} parameters"
    )
    saturation = _saturation(width) if width else None
    if width and saturation:
        least = min(range(width.size), key=lambda unit: width.removal[unit])
        squeezed = _HALF * saturation.value * width.removal[least]
        gain, error = gain * saturation.value, error * saturation.value
        readings = (*readings, saturation)
        reason += f", where {saturation.value:.0%} of the directions are in use"
        if squeezed > gain:
            gain, error = squeezed, _HALF * saturation.value * width.error[least]
            reason = (
                f"'{width.name}' uses {saturation.value:.0%} of its {width.size} directions and "
                f"its least needed unit is worth {width.removal[least]:.4f} nats; more of them "
                f"cost {option.parameters:,} parameters"
            )
    return Candidate(option.edit, -gain, error, option.parameters, option.flops, readings, reason)


def _saturation(width: WidthSurvey) -> Reading | None:
    """Effective rank over width: near 1 when no direction is left, small when most are idle."""
    for reading in width.readings:
        if reading.signal == "effective_rank":
            share = min(1.0, reading.value / width.size)
            error = reading.error / width.size if reading.error is not None else None
            return Reading("saturation", width.name, share, "of width", error, reading.samples)
    return None
