"""How much of a gradient is signal: per parameter tensor, and as the batch size that averages it.

For `plan`: `gradient_snr` far below 1 says that a tensor sees no systematic signal (converged, or
dead), so no growth score next to it can be trusted; a `noise_scale` far above the batch size says
that more samples a step would help more than more units.

Shapes in names: M micro-batches, P parameters (or a sample of their entries).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import Reading, finite_matrix
from neuroexapt.measure.jackknife import spread_left_out


def gradient_snr(gradients_MP: Tensor) -> float:
    """Squared norm of the true gradient over the noise of the mean of the M micro-batches.

    (|mean g|^2 - tr Cov / M) / (tr Cov / M): 0 on average where there is no gradient, 1 where the
    mean gradient is as much signal as noise.

    Invariant: unchanged when all gradients are scaled by one factor; it grows with the number and
    size of the micro-batches. Bias: of order 1/M relative, upwards, and small against its error.

    Raises:
        MeasureError: fewer than 3 micro-batches, or values not finite.

    Example:
        >>> import torch
        >>> round(gradient_snr(torch.tensor([[3.0, 1.0], [3.0, -1.0], [3.0, 0.0]])), 6)
        26.0
    """
    gradients_MP = finite_matrix(gradients_MP, "gradient_snr", rows=3)
    return _sums(gradients_MP)[0].snr


def noise_scale(gradients_MP: Tensor, batch_size: int) -> float:
    """The batch size, in samples, at which noise and gradient weigh the same: tr S / |G|^2.

    S is the covariance of the gradient of a sample, batch_size * Cov over micro-batches; |G|^2 is
    the noise-corrected squared norm. Infinite where no gradient can be told from noise.

    Invariant: unchanged when all gradients are scaled by one factor, and the same at any size of
    micro-batches. Bias: upwards, of the order of its squared relative error.

    Args:
        gradients_MP: one gradient per micro-batch, or the same sample of its entries.
        batch_size: samples per micro-batch.

    Raises:
        MeasureError: fewer than 3 micro-batches, values not finite, or a batch size below 1.

    Example:
        >>> import torch
        >>> round(noise_scale(torch.tensor([[3.0, 1.0], [3.0, -1.0], [3.0, 0.0]]), 26), 6)
        3.0

    McCandlish et al. 2018 (the simple noise scale).
    """
    if batch_size < 1:
        raise MeasureError(
            "noise_scale",
            seen=f"batch_size={batch_size}",
            needed="at least 1",
            next_step="pass the samples per micro-batch",
        )
    gradients_MP = finite_matrix(gradients_MP, "noise_scale", rows=3)
    return _sums(gradients_MP)[0].scale(batch_size)


@dataclass(frozen=True)
class _Sums:
    """Of the products of the micro-batches' gradients: over all pairs, and over each by itself."""

    total: float
    own: float
    count: int

    @property
    def signal(self) -> float:
        """Squared norm of the true gradient."""
        return (self.total - self.own) / (self.count * (self.count - 1))

    @property
    def noise(self) -> float:
        """Trace of the covariance of one micro-batch's gradient."""
        return max(self.own / self.count - self.signal, 0.0)

    @property
    def snr(self) -> float:
        """See `gradient_snr`."""
        if self.noise == 0:
            return math.inf if self.signal > 0 else 0.0
        return self.signal * self.count / self.noise

    def scale(self, batch_size: int) -> float:
        """See `noise_scale`."""
        return batch_size * self.noise / self.signal if self.signal > 0 else math.inf


def _sums(gradients_MP: Tensor) -> tuple[_Sums, list[_Sums]]:
    """Of all micro-batches, and without each of them."""
    own_M = gradients_MP.square().sum(1)
    rows_M = gradients_MP @ gradients_MP.sum(0)
    total, own, count = float(rows_M.sum()), float(own_M.sum()), len(gradients_MP)
    whole = _Sums(total, own, count)
    pairs = zip(rows_M.tolist(), own_M.tolist(), strict=True)
    return whole, [_Sums(total - 2 * row + one, own - one, count - 1) for row, one in pairs]


def read_gradient_snr(gradients_MP: Tensor, at: str) -> Reading:
    """`gradient_snr` as a reading, its error by jackknife over micro-batches.

    Example:
        >>> import torch
        >>> read_gradient_snr(torch.ones(4, 2) + torch.eye(4)[:, :2], "fc1.weight").unit
        'signal to noise'
    """
    whole, rests = _sums(finite_matrix(gradients_MP, "gradient_snr", rows=4))
    # With one micro-batch less the noise of the mean is larger.
    left_out = [rest.snr * whole.count / rest.count for rest in rests]
    error = spread_left_out(left_out) if all(map(math.isfinite, left_out)) else None
    return Reading("gradient_snr", at, whole.snr, "signal to noise", error, whole.count)


def read_noise_scale(gradients_MP: Tensor, batch_size: int, at: str = "model") -> Reading:
    """`noise_scale` as a reading, its error by jackknife over micro-batches.

    The error is None where one micro-batch less would leave no gradient to be told from noise.

    Example:
        >>> import torch
        >>> read_noise_scale(torch.ones(4, 2) + torch.eye(4)[:, :2], 8).unit
        'samples'
    """
    if batch_size < 1:
        noise_scale(gradients_MP, batch_size)
    whole, rests = _sums(finite_matrix(gradients_MP, "noise_scale", rows=4))
    value = whole.scale(batch_size)
    left_out = [rest.scale(batch_size) for rest in rests]
    error = spread_left_out(left_out) if all(map(math.isfinite, [value, *left_out])) else None
    return Reading("noise_scale", at, value, "samples", error, whole.count * batch_size)
