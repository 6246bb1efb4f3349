"""What single units say: entropy at a stated resolution, units stuck at an end of their range.

For `plan`: units of little entropy, or stuck ones, are candidates for `Narrow`; they say nothing
about copies (see `dependence`, `redundancy`), and entropy is not information about the target
(see `information`).

Shapes in names: N rows (samples times positions), C units.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import Reading, finite_matrix, standardized
from neuroexapt.measure.jackknife import jackknife

RESOLUTION = 0.25
_BLOCKS = 16
_BINS = 1 << 20  # more standard deviations than this are one bin


def unit_entropy(acts_NC: Tensor, *, resolution: float = RESOLUTION) -> Tensor:
    """Entropy of each unit in bits, seen in steps of a quarter of its standard deviation.

    The unit is scaled to variance 1, cut in steps of `resolution`, and the entropy of the steps
    taken, with the correction of Miller for few rows, (steps met - 1) / 2N nats. What the scale
    is to a histogram the resolution is here, so it is part of the result: 4.05 bits for a normal
    unit, 3.79 for a uniform one, 1 for two values, 0 for a constant; a ReLU's zeros are one step.

    Invariant: unchanged when a unit is scaled by a positive factor or shifted, up to the place
    where the steps begin. Bias: below 0.01 bits from 1,000 rows.

    Returns:
        entropy_C in float64 on the device of the activations.

    Raises:
        MeasureError: fewer than two rows, values not finite, or a resolution that is not positive.

    Example:
        >>> entropy_C = unit_entropy(torch.tensor([[1.0, 5.0], [3.0, 5.0]] * 500))
        >>> [round(value, 3) for value in entropy_C.tolist()]
        [1.001, 0.0]

    Miller 1955.
    """
    if not 0 < resolution < math.inf:
        raise MeasureError(
            "unit_entropy",
            seen=f"resolution={resolution}",
            needed="a positive number of standard deviations",
            next_step=f"use resolution={RESOLUTION}",
        )
    z_NC, alive_C = standardized(finite_matrix(acts_NC, "unit_entropy", rows=2))
    rows = len(z_NC)
    step_NC = (z_NC / resolution + 0.5).floor().clamp(-_BINS, _BINS).long()
    unit_C = torch.arange(z_NC.shape[1], device=z_NC.device)
    code_NC = step_NC + _BINS + unit_C * (2 * _BINS + 1)
    codes, counts = code_NC.flatten().unique(return_counts=True)
    unit = codes // (2 * _BINS + 1)
    parts = torch.special.entr(counts.double() / rows)
    entropy_C = torch.zeros(z_NC.shape[1], dtype=torch.float64, device=z_NC.device)
    entropy_C = entropy_C.index_add(0, unit, parts + 1 / (2 * rows)) - 1 / (2 * rows)
    return entropy_C.where(alive_C, 0.0) / math.log(2)


def stuck_units(acts_NC: Tensor, *, share: float = 0.95, within: float = 0.02) -> tuple[int, ...]:
    """List the units that nearly always stand at an end of their range, in ascending order.

    A unit is stuck when at least `share` of its values lie within `within` of its range from its
    smallest or its largest value: a saturated sigmoid or tanh, a ReLU that hardly ever opens.
    Constant units are not listed; see `dead_units`.

    Invariant: unchanged when a unit is scaled, shifted or has its sign flipped. Bias: the range
    grows with the rows, so a unit with far outliers looks stuck.

    Raises:
        MeasureError: fewer than two rows, values not finite, or a share outside (0, 1).

    Example:
        >>> x_N = torch.linspace(-3.0, 3.0, 1000)
        >>> stuck_units(torch.stack([torch.tanh(x_N), torch.tanh(100 * x_N)], 1))
        (1,)
    """
    if not (0 < share < 1 and 0 < within < 0.5):
        raise MeasureError(
            "stuck_units",
            seen=f"share={share}, within={within}",
            needed="a share in (0, 1) and a part of the range in (0, 0.5)",
            next_step="use share=0.95, within=0.02",
        )
    acts_NC = finite_matrix(acts_NC, "stuck_units", rows=2)
    low_C, high_C = acts_NC.amin(0), acts_NC.amax(0)
    near_C = within * (high_C - low_C)
    at_end_NC = (acts_NC <= low_C + near_C) | (acts_NC >= high_C - near_C)
    stuck_C = (at_end_NC.double().mean(0) >= share) & (high_C != low_C)
    return tuple(stuck_C.nonzero().flatten().tolist())


def read_unit_entropy(acts_NC: Tensor, at: str) -> Reading:
    """Mean `unit_entropy` of a layer as a reading, its error by jackknife over blocks of rows.

    Example:
        >>> read_unit_entropy(torch.eye(64)[:, :2], "fc1").unit
        'bits per unit'
    """

    def mean(rows_NC: Tensor) -> float:
        return float(unit_entropy(rows_NC).mean())

    error = jackknife(mean, acts_NC, blocks=_BLOCKS)
    return Reading("unit_entropy", at, mean(acts_NC), "bits per unit", error, len(acts_NC))


def read_stuck_units(acts_NC: Tensor, at: str) -> Reading:
    """Number of `stuck_units` as a reading, its error by jackknife over blocks of rows.

    Example:
        >>> read_stuck_units(torch.eye(64)[:, :2], "fc1").value
        2.0
    """

    def count(rows_NC: Tensor) -> float:
        return float(len(stuck_units(rows_NC)))

    error = jackknife(count, acts_NC)
    return Reading("stuck_units", at, count(acts_NC), "units", error, len(acts_NC))
