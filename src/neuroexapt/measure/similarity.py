"""How alike a block's input and output are, and how much a branch adds to its stream.

For `plan`: a block whose output is nearly its input (CKA near 1, a small `branch_ratio`) is worth
asking `ablation` about; both only order the candidates for `RemoveLayer`, they do not predict
what removing costs.

Shapes in names: N rows (samples times positions), C and D units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import Reading, finite_matrix
from neuroexapt.measure.jackknife import spread_left_out

_BLOCKS = 16


def linear_cka(x_NC: Tensor, y_ND: Tensor) -> float:
    """Alikeness of two representations of the same rows: 1 (one turned and scaled), 0 (unrelated).

    HSIC(x, y) / sqrt(HSIC(x, x) HSIC(y, y)) with linear kernels and the unbiased estimate of the
    Hilbert-Schmidt independence criterion, without any N by N matrix: C D numbers are held.

    Invariant: unchanged when either side is rotated, scaled as a whole or shifted; *not* when
    single units are scaled: directions of large variance decide.
    Bias: of order 1/N; may come out slightly below 0 for unrelated sides.

    Raises:
        MeasureError: fewer than 4 rows, other numbers of rows, values not finite, or a side that
            does not vary.

    Example:
        >>> x_NC = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        >>> turn_CC = torch.linalg.qr(torch.randn(3, 3)).Q
        >>> round(linear_cka(x_NC, 5 * x_NC @ turn_CC + 1), 4)
        1.0

    Kornblith et al. 2019; Song et al. 2012 for the unbiased estimate.
    """
    x_NC, y_ND = _sides(x_NC, y_ND, "linear_cka")
    return _cka(x_NC, y_ND)


def _sides(x_NC: Tensor, y_ND: Tensor, signal: str) -> tuple[Tensor, Tensor]:
    if len(x_NC) != len(y_ND):
        raise MeasureError(
            signal,
            seen=f"{len(x_NC)} rows beside {len(y_ND)}",
            needed="the same rows of both",
            next_step="collect both in one call of `activations`",
        )
    sides = [finite_matrix(one, signal, rows=4) for one in (x_NC, y_ND)]
    x_NC, y_ND = (one - one.mean(0) for one in sides)
    for side in (x_NC, y_ND):
        if not bool((side.abs().amax() > 0).all()):
            raise MeasureError(
                signal,
                seen="a representation that is the same in every row",
                needed="one that varies",
                next_step="leave this layer out: nothing passes through it",
            )
    return x_NC, y_ND


def _cka(x_NC: Tensor, y_ND: Tensor) -> float:
    own = _hsic(x_NC, x_NC) * _hsic(y_ND, y_ND)
    return _hsic(x_NC, y_ND) / math.sqrt(own) if own > 0 else math.nan


def _hsic(x_NC: Tensor, y_ND: Tensor) -> float:
    """The unbiased estimate; shifting a side does not change it, so both may be centred."""
    n = len(x_NC)
    own_x_N, own_y_N = x_NC.square().sum(1), y_ND.square().sum(1)
    # Row sums of the kernels without their diagonals.
    rows_x_N = x_NC @ x_NC.sum(0) - own_x_N
    rows_y_N = y_ND @ y_ND.sum(0) - own_y_N
    trace = (x_NC.T @ y_ND).square().sum() - own_x_N @ own_y_N
    level = rows_x_N.sum() * rows_y_N.sum() / ((n - 1) * (n - 2))
    return float(trace + level - 2 / (n - 2) * (rows_x_N @ rows_y_N)) / (n * (n - 3))


def branch_ratio(added_NC: Tensor, stream_NC: Tensor) -> float:
    """Mean squared norm of what a branch adds over that of the stream it is added to.

    Invariant: unchanged when both are scaled by one factor, or turned. Bias: of order 1/N.

    Raises:
        MeasureError: other numbers of rows, values not finite, or a stream of zeros.

    Example:
        >>> branch_ratio(torch.tensor([[1.5, 2.0]]), torch.tensor([[3.0, 4.0]]))
        0.25
    """
    norms_N2 = _norms(added_NC, stream_NC)
    return float(norms_N2[:, 0].sum() / norms_N2[:, 1].sum())


def _norms(added_NC: Tensor, stream_NC: Tensor) -> Tensor:
    sides = [finite_matrix(one, "branch_ratio", rows=1) for one in (added_NC, stream_NC)]
    norms = [one.square().sum(1) for one in sides]
    if len(norms[0]) != len(norms[1]) or not bool(norms[1].sum() > 0):
        raise MeasureError(
            "branch_ratio",
            seen=f"{len(norms[0])} rows beside {len(norms[1])} of a stream",
            needed="the same rows of both, and a stream that is not zero",
            next_step="collect both in one call of `activations`",
        )
    return torch.stack(norms, 1)


def read_linear_cka(x_NC: Tensor, y_ND: Tensor, at: str) -> Reading:
    """`linear_cka` as a reading, its error by jackknife over 16 blocks of rows.

    Example:
        >>> x_NC = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        >>> read_linear_cka(x_NC, x_NC, "block").unit
        'alikeness'
    """
    x_NC, y_ND = _sides(x_NC, y_ND, "linear_cka")
    error = None
    if len(x_NC) >= 4 * _BLOCKS:
        parts = torch.arange(len(x_NC), device=x_NC.device).tensor_split(_BLOCKS)
        kept = [torch.cat([*parts[:skip], *parts[skip + 1 :]]) for skip in range(_BLOCKS)]
        error = spread_left_out([_cka(x_NC[rows], y_ND[rows]) for rows in kept])
    return Reading("linear_cka", at, _cka(x_NC, y_ND), "alikeness", error, len(x_NC))


def read_branch_ratio(added_NC: Tensor, stream_NC: Tensor, at: str) -> Reading:
    """`branch_ratio` as a reading, its error by jackknife over 16 blocks of rows.

    Example:
        >>> read_branch_ratio(torch.ones(64, 2), 2 * torch.ones(64, 2), "block").value
        0.25
    """
    norms_N2 = _norms(added_NC, stream_NC)
    value, error = float(norms_N2[:, 0].sum() / norms_N2[:, 1].sum()), None
    if len(norms_N2) >= 2 * _BLOCKS:
        left_out = norms_N2.sum(0) - torch.stack(
            [part.sum(0) for part in norms_N2.tensor_split(_BLOCKS)]
        )
        error = spread_left_out((left_out[:, 0] / left_out[:, 1]).tolist())
    return Reading("branch_ratio", at, value, "share of the stream", error, len(norms_N2))
