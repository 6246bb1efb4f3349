"""Standard errors of statistics without a formula: leave one block of rows out at a time.

Blocks are contiguous, so that rows of one sample (positions of an image) mostly fall together.

Shapes in names: N rows, C columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

import torch
from torch import Tensor


def jackknife(
    statistic: Callable[[Tensor], float], rows_NC: Tensor, *, blocks: int = 8
) -> float | None:
    """Estimate the standard error of a statistic by leaving out one block of rows at a time.

    Blocks are contiguous, so rows of the same sample (positions of an image) mostly fall together.
    None when a block would have fewer than two rows. Tukey 1958; Kuensch 1989 for blocks.

    Example:
        >>> rows_NC = torch.arange(32.0).reshape(32, 1)
        >>> round(jackknife(lambda rows: float(rows.mean()), rows_NC), 3)
        3.464
    """
    if rows_NC.shape[0] < 2 * blocks:
        return None
    return spread_left_out(without_blocks(statistic, rows_NC, blocks))


def corrected(
    statistic: Callable[[Tensor], float], rows_NC: Tensor, *, blocks: int = 16
) -> tuple[float, float | None]:
    """Value of a statistic without the part of its bias that falls with 1/N, and its error.

    blocks * whole - (blocks - 1) * mean of the values with one block left out; plain value and no
    error where a block would have fewer than two rows. Quenouille 1956, Tukey 1958.

    Example:
        >>> rows_N1 = torch.arange(32.0).repeat_interleave(10)[:, None]
        >>> value, error = corrected(lambda rows: float(rows.mean()), rows_N1)
        >>> round(value, 3)
        15.5
    """
    whole = statistic(rows_NC)
    if rows_NC.shape[0] < 2 * blocks:
        return whole, None
    values = without_blocks(statistic, rows_NC, blocks)
    return blocks * whole - (blocks - 1) * fmean(values), spread_left_out(values)


def without_blocks(
    statistic: Callable[[Tensor], float], rows_NC: Tensor, blocks: int
) -> list[float]:
    """The statistic with each of `blocks` contiguous blocks of rows left out once."""
    parts = rows_NC.tensor_split(blocks)
    return [statistic(torch.cat([*parts[:skip], *parts[skip + 1 :]])) for skip in range(blocks)]


def spread_left_out(values: Sequence[float]) -> float:
    """Jackknife standard error of a statistic from its values with one block left out each.

    Example:
        >>> spread_left_out([1.0, 2.0, 3.0])
        1.1547005383792515
    """
    left_out = torch.tensor(values, dtype=torch.float64)
    return float(((len(left_out) - 1) * (left_out - left_out.mean()).square().mean()).sqrt())
