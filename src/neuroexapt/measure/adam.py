"""What new parameters would earn under Adam, comparable from layer to layer.

For `plan`: the raw norm of a candidate's gradient is biased to the early layers, because a layer
scaled by c has gradients scaled by 1/c; Adam divides that out, and so does this.

Shapes in names: M micro-batches, P parameters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from neuroexapt.errors import MeasureError
from neuroexapt.measure.base import Reading, finite_matrix
from neuroexapt.measure.jackknife import spread_left_out

_GROUPS = 8


def adam_gain(gradients_MP: Tensor, *, rate: float = 1.0) -> tuple[float, float]:
    """Fall of the loss in one early step of Adam, to first order, in nats.

    Adam moves each parameter by rate * m / sqrt(v), about the rate itself where the gradient is
    certain and less where it is noise: the loss falls by rate * sum(g m / sqrt(v)). The direction
    m / sqrt(v) comes from other micro-batches (7 of 8 groups) than the slope g.

    Invariant: unchanged, relative to what other layers promise, when the gradients of a layer are
    scaled by c and its rate by 1/c. Bias: pure noise averages to 0; steps are taken as small.

    Args:
        gradients_MP: gradients on the candidate's P new parameters, from M micro-batches of the
            size that training uses, as v holds the noise too.
        rate: learning rate; candidates of one optimizer compare at any.

    Returns:
        The fall, and its jackknife standard error over groups.

    Raises:
        MeasureError: fewer than 4 micro-batches, values not finite, or a rate not positive.

    Example:
        >>> certain_MP = 5.0 + torch.zeros(8, 3)  # three parameters of slope 5, moving by 0.1
        >>> round(adam_gain(certain_MP, rate=0.1)[0], 6)
        1.5

    Kingma and Ba 2015 for the step.
    """
    if not rate > 0:
        raise MeasureError(
            "adam_gain",
            seen=f"rate={rate}",
            needed="a positive learning rate",
            next_step="pass the optimizer's lr",
        )
    gradients_MP = finite_matrix(gradients_MP, "adam_gain", rows=4)
    parts = torch.arange(len(gradients_MP)).tensor_split(min(_GROUPS, len(gradients_MP)))
    groups = [gradients_MP[part] for part in parts]
    left_out = [_fall(groups[:skip] + groups[skip + 1 :]) for skip in range(len(groups))]
    return rate * _fall(groups), rate * spread_left_out(left_out)


def _fall(groups: list[Tensor]) -> float:
    """Mean over groups of the slope along the step that the other groups give."""
    falls = [
        group.mean(0) @ _step(torch.cat(groups[:skip] + groups[skip + 1 :]))
        for skip, group in enumerate(groups)
    ]
    return float(sum(falls)) / len(falls)


def _step(gradients_MP: Tensor) -> Tensor:
    """m / sqrt(v); zero where nothing moves."""
    root_P = gradients_MP.square().mean(0).sqrt()
    return torch.where(root_P > 0, gradients_MP.mean(0) / root_P.where(root_P > 0, 1.0), 0.0)


def read_adam_gain(gradients_MP: Tensor, at: str, *, rate: float = 1.0) -> Reading:
    """`adam_gain` as a reading.

    Example:
        >>> read_adam_gain(torch.ones(4, 2), "fc1").value
        2.0
    """
    value, error = adam_gain(gradients_MP, rate=rate)
    return Reading("adam_gain", at, value, "nats", error, len(gradients_MP))
