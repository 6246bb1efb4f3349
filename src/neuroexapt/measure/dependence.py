"""How much units say together that they do not say alone, in bits, whatever their scales.

The Gaussian copula: each unit is replaced by the normal quantiles of its ranks, and the
dependence is that of a normal distribution with the correlations found. For `plan`: a high
`total_correlation` per unit says that a width holds copies (`Narrow` costs little); it proposes
and orders, a measured loss decides.

Shapes in names: N rows (samples times positions), C units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import Reading, finite_matrix
from neuroexapt.measure.jackknife import spread_left_out

SHRINKAGE = 1e-4
ROWS_A_UNIT = 5
_BLOCKS = 16


def normal_scores(acts_NC: Tensor) -> Tensor:
    """Replace each unit by the normal quantiles of its ranks; equal values share their mean rank.

    Invariant: unchanged under any increasing map of a unit; mirrored under a decreasing one. A
    constant unit becomes zeros. Van der Waerden 1952.

    Example:
        >>> normal_scores(torch.tensor([[1.0], [100.0], [2.0]])).T
        tensor([[-0.6745,  0.6745,  0.0000]], dtype=torch.float64)
    """
    acts_NC = finite_matrix(acts_NC, "normal_scores", rows=2)
    columns_CN = acts_NC.T.contiguous()
    ordered_CN = columns_CN.sort(1).values
    below_CN = torch.searchsorted(ordered_CN, columns_CN)
    up_to_CN = torch.searchsorted(ordered_CN, columns_CN, right=True)
    rank_CN = (below_CN + up_to_CN + 1).double() / 2
    scores_CN: Tensor = torch.special.ndtri(rank_CN / (acts_NC.shape[0] + 1))
    return scores_CN.T


def total_correlation(acts_NC: Tensor, *, shrinkage: float = SHRINKAGE) -> float:
    """Bits that the units share: the sum of their entropies less their joint entropy.

    -1/2 log2 det R of the correlations R of the normal scores, shrunk to
    (1 - shrinkage) R + shrinkage I, which counts an exact copy as one with a correlation of
    1 - shrinkage instead of as infinitely many bits. Constant units take no part.

    Invariant: unchanged when a unit goes through any monotone map (scaled, shifted, squashed).
    Bias: the mean of log det R of N normal rows is known, and taken off; what is left is below
    a tenth of the standard error for normal units from N = 5 C. With exact copies the value is
    that of the shrinkage, 1/2 log2(1 / shrinkage) bits a copy or so. Blind to dependence that is
    not monotone. Below N = 5 C it is refused.

    Raises:
        MeasureError: fewer than 5 rows a unit, values not finite, or a shrinkage outside (0, 1).

    Example:
        >>> signals_NC = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
        >>> mixed_NC = torch.stack([signals_NC[:, 0], signals_NC.sum(1)], 1)
        >>> round(total_correlation(mixed_NC), 1)  # correlation 0.71: 1/2 bit
        0.5

    Watanabe 1960; Ma and Sun 2011 for the copula.
    """
    if not 0 < shrinkage < 1:
        raise MeasureError(
            "total_correlation",
            seen=f"shrinkage={shrinkage}",
            needed="a number between 0 and 1",
            next_step=f"use shrinkage={SHRINKAGE}",
        )
    scores_NC = _scores(acts_NC, "total_correlation")
    return _shared_bits(_moments(scores_NC), shrinkage)


def shared_information(acts_NC: Tensor, others_ND: Tensor) -> float:
    """Bits that two sets of units share, by the same copula: I(acts; others).

    Invariant: as :func:`total_correlation`, of which it is a difference; symmetric.

    Raises:
        MeasureError: other numbers of rows, or fewer than 5 rows a unit of both.

    Example:
        >>> one_N1 = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
        >>> other_N1 = one_N1 + torch.randn(4000, 1, generator=torch.Generator().manual_seed(1))
        >>> round(shared_information(one_N1, other_N1), 1)
        0.5
    """
    if len(acts_NC) != len(others_ND):
        raise MeasureError(
            "shared_information",
            seen=f"{len(acts_NC)} rows beside {len(others_ND)}",
            needed="the same rows of both",
            next_step="collect both in one call of `activations`",
        )
    joint = torch.cat([acts_NC, others_ND.to(acts_NC)], 1)
    return total_correlation(joint) - total_correlation(acts_NC) - total_correlation(others_ND)


def _scores(acts_NC: Tensor, signal: str) -> Tensor:
    rows, width = acts_NC.shape[0], acts_NC.shape[-1]
    if acts_NC.dim() == 2 and rows < ROWS_A_UNIT * width:
        raise MeasureError(
            signal,
            seen=f"{rows} rows for {width} units",
            needed=f"at least {ROWS_A_UNIT} rows a unit: {ROWS_A_UNIT * width}",
            next_step="collect more rows, or ask about fewer units at a time",
        )
    scores_NC = normal_scores(acts_NC)
    return scores_NC[:, scores_NC.amax(0) != scores_NC.amin(0)]


def _moments(scores_NC: Tensor) -> Tensor:
    """(C + 1, C + 1): sums of products of the scores with a 1 behind; sums of them add."""
    wide_NC = torch.cat([scores_NC, scores_NC.new_ones(len(scores_NC), 1)], 1)
    return wide_NC.T @ wide_NC


def _shared_bits(moments_CC: Tensor, shrinkage: float) -> float:
    rows, width = moments_CC[-1, -1], len(moments_CC) - 1
    if width < 2:
        return 0.0
    # Shared ranks (a ReLU's zeros) move the mean of the scores away from 0.
    mean_C = moments_CC[:-1, -1] / rows
    covariance_CC = moments_CC[:-1, :-1] / rows - mean_C[:, None] * mean_C[None, :]
    scale_C = covariance_CC.diagonal().clamp(min=1e-12).sqrt()
    shrunk_CC = (1 - shrinkage) * covariance_CC / (scale_C[:, None] * scale_C[None, :])
    shrunk_CC.diagonal().fill_(1.0)
    logdet = torch.linalg.cholesky(shrunk_CC).diagonal().log().sum() * 2
    return float(_mean_log_det(width, int(rows)) - logdet) / 2 / math.log(2)


def _mean_log_det(width: int, rows: int) -> float:
    """Mean of log det of the correlations of N normal rows, less its true value.

    The same at any true correlations: that of a Wishart matrix, less that of its diagonal.
    """
    freedom = torch.arange(rows - width, rows, dtype=torch.float64) / 2
    parts = torch.special.digamma(freedom)
    return float((parts - parts[-1]).sum())


def read_total_correlation(acts_NC: Tensor, at: str) -> Reading:
    """`total_correlation` per unit as a reading, its error by jackknife over blocks of rows.

    Example:
        >>> signals_NC = torch.randn(640, 2, generator=torch.Generator().manual_seed(0))
        >>> read_total_correlation(signals_NC, "fc1").unit
        'bits per unit'
    """
    width = acts_NC.shape[1]
    scores_NC = _scores(acts_NC, "total_correlation")
    whole_CC = _moments(scores_NC)
    value = _shared_bits(whole_CC, SHRINKAGE)
    # Ranks are taken once: those of a part differ by less than the parts do.
    parts = scores_NC.tensor_split(_BLOCKS)
    error = None
    if len(acts_NC) - len(parts[0]) > width:
        left_out = [_shared_bits(whole_CC - _moments(part_NC), SHRINKAGE) for part_NC in parts]
        error = spread_left_out(left_out) / width
    return Reading("total_correlation", at, value / width, "bits per unit", error, len(acts_NC))
