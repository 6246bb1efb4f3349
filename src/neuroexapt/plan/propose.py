"""Turn a survey into candidates, all in one currency: expected change of the loss, and cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import sqrt

from neuroexapt.edit import AddRegularization, Edit, Narrow
from neuroexapt.measure import Reading
from neuroexapt.plan.candidate import Candidate
from neuroexapt.plan.fitting import regularisations
from neuroexapt.plan.survey import GrowOption, ShrinkOption, SqueezeOption, Survey, WidthSurvey

# Units bring less the more there are: the next one is expected to be worth half of the last.
_HALF = 0.5


def propose(survey: Survey, significance: float = 2.0, *, stalled: bool = False) -> list[Candidate]:
    """Every candidate of a survey.

    More or less regularisation, each smaller size of each width, several widths at once, and every
    growth.

    Args:
        survey: what was measured.
        significance: standard errors that count as noise.
        stalled: whether the held-out loss falls no more.
    """
    by_name = {width.name: width for width in survey.widths}
    fitting = survey.fitting
    fitted = (
        [] if fitting is None else list(regularisations(fitting, significance, stalled=stalled))
    )
    shrinking = [c for width in survey.widths for c in _narrowings(width)]
    together = [_squeeze(option, by_name) for option in survey.squeeze]
    growing = [_growth(option, by_name.get(option.edit.place)) for option in survey.grow]
    return [*fitted, *shrinking, *together, *growing]


def _narrowings(width: WidthSurvey) -> Iterator[Candidate]:
    for option in width.shrink:
        yield _narrowing(width, option)


def _narrow(width: WidthSurvey, to: int) -> tuple[Narrow, float, float]:
    """The edit, what its units are worth together, and the error of that."""
    order = sorted(range(width.size), key=lambda unit: width.removal[unit])
    removed = order[: width.size - to]
    loss = sum(width.removal[unit] for unit in removed)
    error = sqrt(sum(width.error[unit] ** 2 for unit in removed))
    return Narrow(width.name, to=to, scores={width.name: width.removal}), loss, error


def _thinned(width: WidthSurvey, to: int) -> Iterator[AddRegularization]:
    """Dropout made for many units drops too much of few."""
    for path, p in width.chances:
        if p > 0:
            yield AddRegularization(path, "dropout", round(p * to / width.size, 3))


def _squeeze(option: SqueezeOption, widths: Mapping[str, WidthSurvey]) -> Candidate:
    edits: list[Edit] = []
    loss = square = 0.0
    for name, to in option.sizes:
        edit, part, error = _narrow(widths[name], to)
        edits += [edit, *_thinned(widths[name], to)]
        loss, square = loss + part, square + error**2
    sizes = ", ".join(f"'{name}' from {widths[name].size} to {to}" for name, to in option.sizes)
    error = sqrt(square)
    reason = (
        f"the units least worth their cost, {sizes}, are expected to cost {loss:.4f} nats together "
        f"and hold {-option.parameters:,} parameters and {-option.flops:,} FLOPs"
    )
    units = sum(widths[name].size - to for name, to in option.sizes)
    reading = Reading("removal_loss", "several widths", loss, "nats", error, units)
    first, *also = edits
    return Candidate(
        first, loss, error, option.parameters, option.flops, (reading,), reason, tuple(also)
    )


def _narrowing(width: WidthSurvey, option: ShrinkOption) -> Candidate:
    edit, loss, error = _narrow(width, option.to)
    gone = width.size - option.to
    reason = (
        f"the {gone} least needed of {width.size} units of '{width.name}' are expected "
        f"to cost {loss:.4f} nats together and hold {-option.parameters:,} parameters"
    )
    reading = Reading("removal_loss", width.name, loss, "nats", error, gone)
    readings = (reading, *width.readings)
    also = tuple(_thinned(width, option.to))
    return Candidate(edit, loss, error, option.parameters, option.flops, readings, reason, also)


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
