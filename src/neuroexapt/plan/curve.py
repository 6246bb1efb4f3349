"""What the learning curve says: what a given amount of further computing is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, log, sqrt
from statistics import fmean

_POINTS = 6  # held-out losses that the slope is drawn through
WANDER = 3.0  # noise of a trajectory beside the paired sampling error
_ENOUGH = 5  # points that need no other opinion
_BEGUN = 0.01  # share of a run after which the loss falls by its law
_DOUBT = 0.5  # relative error of the slope that the fall since the start gives


@dataclass(frozen=True)
class Point:
    """A held-out loss at the end of an epoch, with its error.

    Attributes:
        epoch: counted from 1.
        loss: mean held-out loss.
        error: standard error of the loss, or, where the same samples were measured before, of
            its change since then.
        progress: share of the run that is done; None if its length is not known.
    """

    epoch: int
    loss: float
    error: float
    progress: float | None = None


def steepness(points: Sequence[Point], start: float | None = None) -> float:
    """Nats that the loss falls for each e-fold of training: L = a - b * log(progress), b >= 0.

    Least squares through the last six points. While they are fewer than five, what the loss has
    fallen by since the start is the other opinion (``start`` being the loss of the untrained
    model), and each counts by its precision. 0 with fewer than three points and no start.

    Example:
        >>> points = [Point(n, 2.0 - 0.5 * log(n), 0.0, n / 10) for n in (1, 2, 3, 4)]
        >>> round(steepness(points), 6)
        0.5

    Hestness et al. 2017: over most of a run the loss falls as a power of the training done, of
    which this is the local slope.
    """
    known = [p for p in points if p.progress and isfinite(p.loss)]
    pairs = [(log(p.progress or 1.0), p.loss) for p in known[-_POINTS:]]
    whole = _since_start(known, start)
    if len(pairs) < 3:
        return whole
    slope, error = _line(pairs, WANDER * known[-1].error)
    prior = _DOUBT * whole
    if prior <= 0 or len(pairs) >= _ENOUGH:
        return max(0.0, slope)
    weight = prior**2 / (prior**2 + error**2)
    return max(0.0, weight * slope + (1 - weight) * whole)


def _since_start(points: Sequence[Point], start: float | None) -> float:
    """The fall since the untrained model, over the e-folds from the first hundredth of the run."""
    if start is None or not points or not isfinite(start):
        return 0.0
    folds = log(max(points[-1].progress or 0.0, 2 * _BEGUN) / _BEGUN)
    return max(0.0, (start - points[-1].loss) / folds)


def _line(pairs: Sequence[tuple[float, float]], noise: float) -> tuple[float, float]:
    """Fall by unit of x, and its standard error where each y has this noise or its own scatter."""
    x0, y0 = fmean(x for x, _ in pairs), fmean(y for _, y in pairs)
    square = sum((x - x0) ** 2 for x, _ in pairs)
    if not square:
        return 0.0, noise
    slope = sum((x - x0) * (y - y0) for x, y in pairs) / square
    left = sum((y - y0 - slope * (x - x0)) ** 2 for x, y in pairs) / (len(pairs) - 2)
    return -slope, max(noise, sqrt(left)) / sqrt(square)


def stalled(points: Sequence[Point]) -> bool:
    """Whether the last two held-out losses are no better than what was there before.

    Example:
        >>> stalled([Point(n, loss, 0.01) for n, loss in enumerate((0.5, 0.4, 0.41, 0.42))])
        True
    """
    losses = [point.loss for point in points]
    return len(losses) > 2 and min(losses[-2:]) >= min(losses[:-2])


def worth_of_speed(points: Sequence[Point], ratio: float, start: float | None = None) -> float:
    """Nats that the end of the run gains if each step costs ``ratio`` of what it costs now.

    The computing that is left then holds 1 / ratio as many steps: the curve is followed to
    p + (1 - p) / ratio instead of to 1. Negative for steps that cost more.

    Example:
        >>> points = [Point(n, 2.0 - 0.5 * log(n), 0.0, n / 10) for n in (1, 2, 3, 4)]
        >>> round(worth_of_speed(points, 0.5), 3), worth_of_speed(points, 1.0)
        (0.235, 0.0)
    """
    progress = points[-1].progress if points else None
    if progress is None or not ratio > 0:
        return 0.0
    return steepness(points, start) * log(progress + (1 - progress) / ratio)
