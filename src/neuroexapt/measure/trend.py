"""Where training stands: is the loss still falling, and how far is held-out loss from training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import HoldoutScore, Reading


@dataclass(frozen=True)
class Trend:
    """A straight line through the last losses.

    Args:
        slope: change of the loss per point; negative while training makes progress.
        error: standard error of the slope.
        residual: standard deviation of the losses around the line.
        samples: number of points.

    Example:
        >>> Trend(slope=-0.1, error=0.02, residual=0.05, samples=20).slope
        -0.1
    """

    slope: float
    error: float
    residual: float
    samples: int


def plateau_slope(losses: Sequence[float], *, points: int = 20) -> Trend:
    """Fit a line by least squares through the last points of a loss curve.

    The errors take the points as independent; smoothed losses make them too small.

    Args:
        losses: losses in order, one per step, epoch or evaluation.
        points: how many of the last losses count; all of them when there are fewer.

    Returns:
        Slope, its error and the residual standard deviation, with two degrees of freedom spent.

    Raises:
        MeasureError: fewer than three points, or a loss that is not finite.

    Example:
        >>> plateau_slope([5.0, 4.0, 3.0, 2.0])
        Trend(slope=-1.0, error=0.0, residual=0.0, samples=4)
    """
    values = np.asarray(list(losses)[-points:] if points > 0 else [], dtype=np.float64)
    if len(values) < 3 or not np.isfinite(values).all():
        raise MeasureError(
            "plateau_slope",
            seen=f"{len(values)} points, {int(np.isfinite(values).sum())} of them finite",
            needed="at least 3 finite losses",
            next_step="wait for more steps, or ask for more points",
        )
    time = np.arange(len(values)) - (len(values) - 1) / 2
    spread = float(time @ time)
    slope = float(time @ values) / spread
    left = values - values.mean() - slope * time
    residual = math.sqrt(float(left @ left) / (len(values) - 2))
    return Trend(slope, residual / math.sqrt(spread), residual, len(values))


def read_plateau_slope(losses: Sequence[float], at: str = "model", *, points: int = 20) -> Reading:
    """`plateau_slope` as a reading.

    Example:
        >>> read_plateau_slope([5.0, 4.0, 3.0]).unit
        'nats per point'
    """
    trend = plateau_slope(losses, points=points)
    return Reading("plateau_slope", at, trend.slope, "nats per point", trend.error, trend.samples)


def generalisation_gap(train: HoldoutScore, holdout: HoldoutScore) -> Reading:
    """Held-out loss minus training loss, both measured in eval mode by `evaluate`.

    The two sets are independent, so the error is the root of the summed squares; None when
    one of them is unknown. Samples are those of the smaller set.

    Example:
        >>> train = HoldoutScore(0.25, 0.03, 64, (0.25, 0.25))
        >>> holdout = HoldoutScore(1.0, 0.04, 32, (1.0, 1.0))
        >>> gap = generalisation_gap(train, holdout)
        >>> gap.value, gap.error
        (0.75, 0.05)
    """
    known = train.error is not None and holdout.error is not None
    error = math.hypot(train.error or 0.0, holdout.error or 0.0) if known else None
    samples = min(train.samples, holdout.samples)
    return Reading("generalisation_gap", "model", holdout.loss - train.loss, "nats", error, samples)
