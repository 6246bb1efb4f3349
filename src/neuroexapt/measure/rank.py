"""How many directions the units of a layer use, and which units are copies or constant.

Shapes in names: N rows (samples times positions), C units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import Reading, finite_matrix, standardized
from neuroexapt.measure.jackknife import corrected, jackknife


def effective_rank(acts_NC: Tensor) -> float:
    """Exponential of the entropy of the correlation spectrum: 1 (all alike) to C (all different).

    With eigenvalues l_i of the correlation matrix and p_i = l_i / sum(l), this is
    exp(-sum p_i ln p_i), in units. The *correlation* matrix, because on the covariance one loud
    unit decides. Constant units contribute 0; a layer of constant units has rank 0.

    Invariant: unchanged when a unit is scaled, shifted or has its sign flipped.
    Bias: too low by about C^2 / 2N for independent units; use N of at least 10 C.

    Raises:
        MeasureError: fewer than two rows, or values not finite.

    Example:
        >>> signals_NC = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> round(effective_rank(signals_NC.repeat(1, 3)), 2)
        2.0

    Roy and Vetterli 2007.
    """
    z_NC, alive_C = standardized(finite_matrix(acts_NC, "effective_rank", rows=2))
    if not bool(alive_C.any()):
        return 0.0
    count, width = z_NC.shape
    # Both products have the same non-zero eigenvalues; the smaller is the cheaper.
    gram = z_NC.T @ z_NC if width <= count else z_NC @ z_NC.T
    shares = torch.linalg.eigvalsh(gram).clamp(min=0)
    shares = shares / shares.sum()
    return float(torch.exp(torch.special.entr(shares).sum()))


def participation_ratio(acts_NC: Tensor) -> float:
    """Number of directions that carry the correlations: 1 (all alike) to C (all different).

    (tr R)^2 / tr R^2 for the correlation matrix R of the units that are not constant, with the
    chance part of each squared correlation, (1 - r^2) / (N - 2), taken off; at most C.

    Invariant: unchanged when a unit is scaled, shifted or has its sign flipped.
    Bias: small against the error from N of about C; it gives quiet directions less weight than
    `effective_rank` does, so noise on copies moves it less.

    Raises:
        MeasureError: fewer than four rows, or values not finite.

    Example:
        >>> signals_NC = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> round(participation_ratio(signals_NC.repeat(1, 3)), 2)
        2.0

    Gao et al. 2017 for the ratio.
    """
    z_NC, alive_C = standardized(finite_matrix(acts_NC, "participation_ratio", rows=4))
    z_NC = z_NC[:, alive_C]
    rows, width = z_NC.shape
    if width == 0:
        return 0.0
    square_CC = (z_NC.T @ z_NC / rows).square().clamp(max=1)
    total = float((square_CC - (1 - square_CC) / (rows - 2)).sum())
    return width**2 / max(total, float(width))


def dead_units(acts_NC: Tensor) -> tuple[int, ...]:
    """List the units that have the same value in every row, in ascending order.

    Raises:
        MeasureError: fewer than two rows, or values not finite.

    Example:
        >>> dead_units(torch.tensor([[1.0, 0.0], [2.0, 0.0]]))
        (1,)
    """
    acts_NC = finite_matrix(acts_NC, "dead_units", rows=2)
    same_C = acts_NC.amax(0) == acts_NC.amin(0)
    return tuple(same_C.nonzero().flatten().tolist())


def duplicate_units(acts_NC: Tensor, *, threshold: float = 0.95) -> int:
    """Count units whose absolute correlation with an earlier kept unit exceeds the threshold.

    Greedy in the order of the units: a duplicate is not kept, so a chain of slowly changing units
    is not one family. Constant units are no duplicates; see `dead_units`.

    Invariant: unchanged when a unit is scaled, shifted or has its sign flipped.

    Raises:
        MeasureError: fewer than two rows, values not finite, or a threshold outside (0, 1).

    Example:
        >>> signals_NC = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> duplicate_units(signals_NC.repeat(1, 3))
        4
    """
    if not 0 < threshold < 1:
        raise MeasureError(
            "duplicate_units",
            seen=f"threshold={threshold}",
            needed="a number between 0 and 1",
            next_step="use threshold=0.95",
        )
    z_NC, _ = standardized(finite_matrix(acts_NC, "duplicate_units", rows=2))
    alike_CC = ((z_NC.T @ z_NC / z_NC.shape[0]).abs() > threshold).cpu()
    kept_C = torch.zeros(alike_CC.shape[0], dtype=torch.bool)
    for unit, alike_C in enumerate(alike_CC):
        kept_C[unit] = not bool((alike_C & kept_C).any())
    return int((~kept_C).sum())


def read_effective_rank(acts_NC: Tensor, at: str) -> Reading:
    """`effective_rank` as a reading, its error by jackknife over blocks of rows.

    Example:
        >>> read_effective_rank(torch.eye(64)[:, :2], "fc1").unit
        'units'
    """
    value, error = effective_rank(acts_NC), jackknife(effective_rank, acts_NC)
    return Reading("effective_rank", at, value, "units", error, acts_NC.shape[0])


def read_saturation(acts_NC: Tensor, at: str) -> Reading:
    """`effective_rank` over the width, less its bias of order 1/N, as a reading.

    1 where every unit adds a direction: the width is full, and may be what holds the model back.
    Its error is a jackknife over 16 blocks of rows.

    Example:
        >>> signals_NC = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> round(read_saturation(signals_NC.repeat(1, 2), "fc1").value, 2)
        0.5
    """
    width = acts_NC.shape[1]
    value, error = corrected(lambda rows_NC: effective_rank(rows_NC) / width, acts_NC)
    return Reading("saturation", at, value, "share of width", error, acts_NC.shape[0])


def read_participation_ratio(acts_NC: Tensor, at: str) -> Reading:
    """`participation_ratio` over the width as a reading, its error by jackknife.

    Example:
        >>> round(read_participation_ratio(torch.randn(64, 1).repeat(1, 2), "fc1").value, 6)
        0.5
    """
    width = acts_NC.shape[1]

    def share(rows_NC: Tensor) -> float:
        return participation_ratio(rows_NC) / width

    error = jackknife(share, acts_NC, blocks=16)
    return Reading("participation_ratio", at, share(acts_NC), "share of width", error, len(acts_NC))


def read_dead_units(acts_NC: Tensor, at: str) -> Reading:
    """Number of `dead_units` as a reading, its error by jackknife over blocks of rows.

    Example:
        >>> read_dead_units(torch.eye(64)[:, :2], "fc1").value
        0.0
    """
    value, error = _dead_count(acts_NC), jackknife(_dead_count, acts_NC)
    return Reading("dead_units", at, value, "units", error, acts_NC.shape[0])


def _dead_count(acts_NC: Tensor) -> float:
    return float(len(dead_units(acts_NC)))


def read_duplicate_units(acts_NC: Tensor, at: str, *, threshold: float = 0.95) -> Reading:
    """`duplicate_units` as a reading, its error by jackknife over blocks of rows.

    Example:
        >>> read_duplicate_units(torch.randn(64, 1).repeat(1, 3), "fc1").value
        2.0
    """

    def count(rows_NC: Tensor) -> float:
        return float(duplicate_units(rows_NC, threshold=threshold))

    return Reading(
        "duplicate_units", at, count(acts_NC), "units", jackknife(count, acts_NC), acts_NC.shape[0]
    )
