"""What new parameters would earn, from their gradients before they are trained.

Shapes in names: M micro-batches, P parameters, K groups of micro-batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import finite_matrix

_GROUPS = 8
_NOTHING = 1e-20  # share of squared slopes below which only rounding is left


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


def slopes(gradients_MP: Tensor, batch_size: int, *, damping: float = 0.1) -> Tensor:
    """Per micro-batch the slope of the loss along the natural direction of the other ones.

    The direction is d = g / (F + l) scaled to length 1, with g the mean gradient, F the diagonal
    of the per-sample empirical Fisher information batch_size * variance_m(g) + g^2, and
    l = damping * mean_p F_p. The micro-batches are split in at most 8 groups; the slope on a
    group is taken along the direction of the others, so noise does not point at itself.

    Returns:
        Shape (M,). Positive where the loss falls along the step -d.

    Raises:
        MeasureError: fewer than 4 micro-batches, values not finite, batch size below 1, or
            negative damping.
    """
    _check_settings(batch_size, damping)
    gradients_MP = finite_matrix(gradients_MP, "growth_gain", rows=4)
    along_M = gradients_MP.new_zeros(len(gradients_MP))
    for part in _parts(len(gradients_MP)):
        rest = torch.ones(len(gradients_MP), dtype=torch.bool)
        rest[part] = False
        along_M[part] = gradients_MP[part] @ _direction(gradients_MP[rest], batch_size, damping)
    return along_M


def growth_gain(
    gradients_MP: Tensor,
    batch_size: int,
    *,
    damping: float = 0.1,
    beside_M: Tensor | None = None,
) -> tuple[float, float]:
    """Expected fall of the mean loss along the candidate's natural direction, in nats.

    With s the mean of :func:`slopes` and f = E (per-sample slope)^2 the curvature along the
    same direction, the best step gains 1/2 s^2 / f. That is the block natural score
    1/2 g' F^-1 g held to one direction: equal to it for one parameter or an isotropic F, and
    never above 1/2 nat, where the diagonal score sums what correlated parameters would earn
    twice (it promised hundreds of nats for candidates that brought a hundredth).

    ``beside_M``, the slopes of the parameters that are there already, takes off what a step of
    these would earn as well: the slope is replaced by its residual, so that training which has
    simply not finished is not mistaken for a lack of capacity.

    Noise correction: the squared error of the mean slope is taken off, and the gain has the sign
    of the slope, so that pure noise averages to 0.

    Invariant: unchanged when all parameters of the candidate are rescaled by one factor.

    Args:
        gradients_MP: gradients on the candidate's P new parameters, from M micro-batches.
        batch_size: samples per micro-batch.
        damping: see :func:`slopes`.
        beside_M: slopes of the existing parameters on the same micro-batches.

    Returns:
        The gain and its standard error over groups.

    Raises:
        MeasureError: see :func:`slopes`; or ``beside_M`` of another length.

    Example:
        >>> noise_MP = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
        >>> gain, error = growth_gain(1.0 + noise_MP, batch_size=1)
        >>> 0.0 < gain < 0.5
        True

    Mitchell et al. 2023 (natural expansion score), on one block and one direction.
    """
    along_M = slopes(gradients_MP, batch_size, damping=damping)
    whole = along_M.square().sum()
    if beside_M is not None:
        along_M = _residual(along_M, beside_M.to(along_M), batch_size)
    slopes_K = torch.stack([along_M[part].mean() for part in _parts(len(along_M))])
    slope, error = slopes_K.mean(), slopes_K.std() / len(slopes_K) ** 0.5
    fisher = batch_size * along_M.var() + slope.square()
    if float(along_M.square().sum()) <= _NOTHING * float(whole):
        return 0.0, 0.0  # what is left is rounding
    square = (slope.square() - error.square()).clamp(min=0)
    spread = slope.abs() * error + 0.5 * error.square()
    return float(0.5 * slope.sign() * square / fisher), float(spread / fisher)


def _residual(along_M: Tensor, beside_M: Tensor, batch_size: int) -> Tensor:
    """The slopes without the part that the other slopes predict (per-sample second moments)."""
    if along_M.shape != beside_M.shape:
        raise MeasureError(
            "growth_gain",
            seen=f"{len(beside_M)} slopes beside {len(along_M)} micro-batches",
            needed="one slope per micro-batch",
            next_step="measure both on the same micro-batches",
        )
    centred = batch_size / (len(along_M) - 1)
    both = centred * (along_M - along_M.mean()) @ (beside_M - beside_M.mean())
    both = both + along_M.mean() * beside_M.mean()
    own = centred * (beside_M - beside_M.mean()).square().sum() + beside_M.mean().square()
    return along_M - _divided(both, own) * beside_M


def _parts(count: int) -> tuple[Tensor, ...]:
    return torch.arange(count).tensor_split(min(_GROUPS, count))


def _direction(gradients_MP: Tensor, batch_size: int, damping: float) -> Tensor:
    """g / (F + l), scaled to length 1; zero where nothing moves."""
    mean_P = gradients_MP.mean(0)
    fisher_P = batch_size * gradients_MP.var(0) + mean_P.square()
    direction_P = _divided(mean_P, fisher_P + damping * fisher_P.mean())
    return _divided(direction_P, direction_P.norm())


def _check_settings(batch_size: int, damping: float) -> None:
    if batch_size < 1 or not damping >= 0:
        raise MeasureError(
            "growth_gain",
            seen=f"batch_size={batch_size}, damping={damping}",
            needed="batch_size of at least 1 and damping of at least 0",
            next_step="pass the samples per micro-batch and damping=0.1",
        )


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
