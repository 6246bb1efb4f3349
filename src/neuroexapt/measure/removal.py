"""What it would cost to remove a unit, from gradients alone.

Shapes in names: M micro-batches, U units.
"""

from __future__ import annotations

from torch import Tensor

from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import finite_matrix


def removal_loss(sums_MU: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Expected rise of the mean loss if a unit is removed, in the unit of the loss (nats).

    Picture a gate of value 1 that multiplies what the unit puts out. The derivative of the loss
    with respect to the gate is s = sum of gradient times weight over the unit's consumer weights.
    Closing the gate changes the loss by -s + h / 2 to second order; h, the second derivative, is
    replaced by the gate's diagonal empirical Fisher information, the mean squared per-sample s::

        value = |mean_m s| + fisher / 2
        fisher = batch_size * variance_m(s) + (mean_m s)^2

    A mean over `batch_size` samples has 1 / batch_size of the per-sample variance, which is why no
    per-sample gradient is needed. The absolute value counts a promised fall as a cost as well: a
    large slope in either direction means that the unit matters. It also makes noise count, up to
    about its standard error. Units are judged one at a time; removing two copies costs more than
    the sum.

    Invariant: 0 for a unit whose consumer weights or gradients are all 0.

    Args:
        sums_MU: s of each unit on each micro-batch, from the mean loss of the micro-batch.
        batch_size: samples per micro-batch.

    Returns:
        value_U and error_U, float64: error is the jackknife standard error over micro-batches.

    Raises:
        MeasureError: fewer than 3 micro-batches, values not finite, or a batch size below 1.

    Example:
        >>> import torch
        >>> value_U, error_U = removal_loss(torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]), 8)
        >>> value_U.tolist()
        [5.5, 0.0]

    Molchanov et al. 2019 (first order, on gates); LeCun, Denker and Solla 1990 (second order).
    """
    if batch_size < 1:
        raise MeasureError(
            "removal_loss",
            seen=f"batch_size={batch_size}",
            needed="at least 1",
            next_step="pass the samples per micro-batch",
        )
    sums_MU = finite_matrix(sums_MU, "removal_loss", rows=3)
    count = sums_MU.shape[0]
    value_U = _expected_rise(sums_MU.mean(0), sums_MU.var(0), batch_size)
    mean_MU, variance_MU = _left_out(sums_MU)
    values_MU = _expected_rise(mean_MU, variance_MU, batch_size)
    error_U = ((count - 1) * (values_MU - values_MU.mean(0)).square().mean(0)).sqrt()
    return value_U, error_U


def _expected_rise(mean: Tensor, variance: Tensor, batch_size: int) -> Tensor:
    return mean.abs() + 0.5 * (batch_size * variance + mean.square())


def _left_out(sums_MU: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance of all micro-batches but one, for each one left out."""
    count = sums_MU.shape[0]
    away_MU = sums_MU - sums_MU.mean(0)
    mean_MU = sums_MU.mean(0) - away_MU / (count - 1)
    squares_MU = away_MU.square().sum(0) - away_MU.square() * count / (count - 1)
    return mean_MU, squares_MU.clamp(min=0) / (count - 2)
