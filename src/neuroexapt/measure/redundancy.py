"""How well the other units of a layer predict a unit: what can be pruned and folded.

Shapes in names: N rows (samples times positions), C units.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import Reading, finite_matrix, standardized
from neuroexapt.measure.jackknife import jackknife


def unit_redundancy(acts_NC: Tensor, *, ridge: float = 1e-3) -> Tensor:
    """Share of each unit's variance that a linear map of the other units explains, R^2 in 0 to 1.

    With the correlation matrix K shrunk to (1 - ridge) K + ridge I, R^2_j = 1 - 1 / (K^-1)_jj,
    then adjusted for the C - 1 regressors (1 - (1 - R^2)(N - 1)/(N - C), not below 0), so that
    independent units have about 0 at any N. The ridge keeps an exact copy at about 1 - 2 ridge. A
    constant unit has R^2 = 1: it folds into a bias without loss.

    Invariant: unchanged when a unit is scaled, shifted or has its sign flipped.

    Args:
        acts_NC: activations; the estimate is good from N of about 10 C.
        ridge: shrinkage, between 0 and 1.

    Returns:
        redundancy_C in float64 on the CPU.

    Raises:
        MeasureError: not more rows than units, values not finite, or ridge outside (0, 1).

    Example:
        >>> signals_NC = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> mixed_NC = torch.cat([signals_NC, signals_NC[:, :1]], dim=1)
        >>> [round(value, 2) for value in unit_redundancy(mixed_NC).tolist()]
        [1.0, 0.0, 1.0]

    Theil 1961 for the adjustment; variance inflation factors for the diagonal of the inverse.
    """
    if not 0 < ridge < 1:
        raise MeasureError(
            "unit_redundancy",
            seen=f"ridge={ridge}",
            needed="a number between 0 and 1",
            next_step="use ridge=1e-3",
        )
    acts_NC = finite_matrix(acts_NC, "unit_redundancy", rows=acts_NC.shape[-1] + 1)
    z_NC, alive_C = standardized(acts_NC)
    redundancy_C = torch.ones(z_NC.shape[1], dtype=torch.float64)
    redundancy_C[alive_C.cpu()] = _explained(z_NC[:, alive_C], ridge).cpu()
    return redundancy_C


def _explained(z_NC: Tensor, ridge: float) -> Tensor:
    count, width = z_NC.shape
    identity_CC = torch.eye(width, dtype=z_NC.dtype, device=z_NC.device)
    shrunk_CC = (1 - ridge) * (z_NC.T @ z_NC) / count + ridge * identity_CC
    unexplained_C = 1 / torch.cholesky_inverse(torch.linalg.cholesky(shrunk_CC)).diagonal()
    return (1 - unexplained_C * (count - 1) / (count - width)).clamp(0, 1)


def read_redundancy(acts_NC: Tensor, at: str, *, ridge: float = 1e-3) -> Reading:
    """Mean `unit_redundancy` of a layer as a reading, its error by jackknife over blocks of rows.

    Example:
        >>> signals_NC = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> round(read_redundancy(signals_NC.repeat(1, 2), "fc1").value, 2)
        1.0
    """

    def mean(rows_NC: Tensor) -> float:
        return float(unit_redundancy(rows_NC, ridge=ridge).mean())

    enough = acts_NC.shape[0] * 7 // 8 > acts_NC.shape[1] + 1
    error = jackknife(mean, acts_NC) if enough else None
    return Reading("redundancy", at, mean(acts_NC), "share of variance", error, acts_NC.shape[0])
