"""What new parameters would earn, from their gradients before they are trained.

Shapes in names: M micro-batches, P parameters, K groups of micro-batches.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import finite_matrix

_GROUPS = 8


def noise_corrected_norm(gradients_MP: Tensor) -> tuple[float, float]:
    """Squared norm of the true gradient, without the part that sampling noise adds.

    (M |mean_m g|^2 - mean_m |g_m|^2) / (M - 1), which equals the mean of g_m . g_n over all pairs
    of different micro-batches.

    Invariant: its expectation is |E g|^2 at any number and size of micro-batches; it may come out
    negative when the true gradient is small.

    Args:
        gradients_MP: one gradient per micro-batch, flattened.

    Returns:
        The value, in (unit of the loss / unit of the parameters)^2, and its jackknife standard
        error over micro-batches (on the safe side when the true gradient is 0).

    Raises:
        MeasureError: fewer than 3 micro-batches, or values not finite.

    Example:
        >>> noise_corrected_norm(torch.tensor([[3.0, 1.0], [3.0, -1.0], [3.0, 0.0]]))[0]
        8.666666666666666

    Efron and Stein 1981 for the error; the correction is the one of the gradient noise scale,
    McCandlish et al. 2018.
    """
    gradients_MP = finite_matrix(gradients_MP, "noise_corrected_norm", rows=3)
    return _mean_of_pairs(gradients_MP @ gradients_MP.T)


def growth_gain(
    gradients_MP: Tensor, batch_size: int, *, damping: float = 0.1
) -> tuple[float, float]:
    """Expected fall of the mean loss when the candidate takes one natural-gradient step, in nats.

    Computes 1/2 sum_p g_p^2 / (F_p + l), the block natural score 1/2 g' (F + l)^-1 g with a
    diagonal F, where g is the gradient of the mean loss, F_p the per-sample empirical Fisher
    information batch_size * variance_m(g_p) + (mean_m g_p)^2, and l = damping * mean_p F_p.

    Noise correction: the micro-batches are split in at most 8 groups; g_p^2 is the product of the
    means of two different groups and F_p comes from the remaining micro-batches, averaged over all
    pairs of groups. Numerator factors and F are then independent, so the expectation is exactly 0
    when the true gradient is 0, at any P. It may come out negative.

    Invariant: unchanged when all parameters of the candidate are rescaled by one factor.
    Limits: the diagonal counts what correlated parameters could earn twice; 1/F from few
    micro-batches is too large, by (n - 1)/(n - 3) for n of them and normal noise, damping aside.
    Compare candidates at the same M.

    Args:
        gradients_MP: gradients on the candidate's P new parameters, from M micro-batches; M of 16
            or more is advised.
        batch_size: samples per micro-batch.
        damping: l relative to the mean of F; bounds what parameters with little F can claim.

    Returns:
        The gain and its jackknife standard error over groups (on the safe side near gain 0).

    Raises:
        MeasureError: fewer than 4 micro-batches, values not finite, batch size below 1, or
            negative damping.

    Example:
        >>> noise_MP = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
        >>> gain, error = growth_gain(1.0 + 0.1 * noise_MP, batch_size=1)
        >>> round(gain, 2)
        1.35

    Mitchell et al. 2023 (natural expansion score), on one block and with a diagonal.
    """
    _check_settings(batch_size, damping)
    gradients_MP = finite_matrix(gradients_MP, "growth_gain", rows=4)
    groups = _Groups.of(gradients_MP)
    count = len(groups.sizes)
    gains_KK = gradients_MP.new_zeros(count, count)
    for first, second in combinations(range(count), 2):
        fisher_P = groups.fisher_without(first, second, batch_size)
        product_P = groups.mean(first) * groups.mean(second)
        gain = 0.5 * _divided(product_P, fisher_P + damping * fisher_P.mean()).sum()
        gains_KK[first, second] = gains_KK[second, first] = gain
    return _mean_of_pairs(gains_KK)


def _check_settings(batch_size: int, damping: float) -> None:
    if batch_size < 1 or not damping >= 0:
        raise MeasureError(
            "growth_gain",
            seen=f"batch_size={batch_size}, damping={damping}",
            needed="batch_size of at least 1 and damping of at least 0",
            next_step="pass the samples per micro-batch and damping=0.1",
        )


@dataclass(frozen=True)
class _Groups:
    """Sums per group of micro-batches, so that leaving two groups out costs O(P), not O(M P)."""

    centre_P: Tensor
    sizes: tuple[int, ...]
    sums_KP: Tensor
    squares_KP: Tensor

    @classmethod
    def of(cls, gradients_MP: Tensor) -> _Groups:
        # Sums about the overall mean: sums of raw squares would cancel when the noise is small.
        centre_P = gradients_MP.mean(0)
        parts = (gradients_MP - centre_P).tensor_split(min(_GROUPS, gradients_MP.shape[0]))
        sums_KP = torch.stack([part.sum(0) for part in parts])
        squares_KP = torch.stack([part.square().sum(0) for part in parts])
        return cls(centre_P, tuple(len(part) for part in parts), sums_KP, squares_KP)

    def mean(self, group: int) -> Tensor:
        return self.centre_P + self.sums_KP[group] / self.sizes[group]

    def fisher_without(self, first: int, second: int, batch_size: int) -> Tensor:
        """Per-sample Fisher diagonal from the micro-batches outside two groups."""
        count = sum(self.sizes) - self.sizes[first] - self.sizes[second]
        # All sums together are 0, so what is left is minus what is taken away.
        sum_P = -(self.sums_KP[first] + self.sums_KP[second])
        squares_P = self.squares_KP.sum(0) - self.squares_KP[first] - self.squares_KP[second]
        variance_P = (squares_P - sum_P.square() / count).clamp(min=0) / (count - 1)
        return batch_size * variance_P + (self.centre_P + sum_P / count).square()


def _divided(top_P: Tensor, bottom_P: Tensor) -> Tensor:
    """Quotient, and 0 where the bottom is 0: a parameter that no sample moves earns nothing."""
    return torch.where(bottom_P > 0, top_P / bottom_P.where(bottom_P > 0, 1.0), 0.0)


def _mean_of_pairs(values_KK: Tensor) -> tuple[float, float]:
    """Mean over pairs of different members, and its jackknife error over members."""
    count = values_KK.shape[0]
    rows_K = values_KK.sum(1) - values_KK.diagonal()
    total = rows_K.sum()
    left_out_K = (total - 2 * rows_K) / ((count - 1) * (count - 2))
    error = ((count - 1) * (left_out_K - left_out_K.mean()).square().mean()).sqrt()
    return float(total / (count * (count - 1))), float(error)
