"""Which weights to keep: pure arithmetic on scores, and the two schedules of the field."""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, pi

import torch
from torch import Tensor

from neuroexapt.errors import EditError

_MANY, _SAMPLE = 2**20, 2**16


def sparsity_at(
    step: int, *, final: float, steps: int, start: int = 0, initial: float = 0.0
) -> float:
    """The share of weights that a gradual schedule has pruned at a step: fast first, then slower.

    ``final + (initial - final) * (1 - (step - start) / steps) ** 3``; ``initial`` until
    ``start``, ``final`` from ``start + steps`` on. Never falls while ``final >= initial``.

    Args:
        step: the training step.
        final: share in the end, from 0 to 1.
        steps: number of steps from ``start`` to ``final``.
        start: the step at which pruning begins.
        initial: share before that.

    Raises:
        EditError: a share outside of 0 to 1, or no steps.

    Example:
        >>> [round(sparsity_at(step, final=0.8, steps=100), 3) for step in (0, 10, 50, 100, 200)]
        [0.0, 0.217, 0.7, 0.8, 0.8]

    Zhu and Gupta 2017.
    """
    _check_schedule("sparsity_at", steps, initial=initial, final=final)
    done = min(1.0, max(0.0, (step - start) / steps))
    return final + (initial - final) * (1 - done) ** 3


def drop_fraction(step: int, *, steps: int, first: float = 0.3) -> float:
    """The share of the kept weights that one regrowth exchanges at a step.

    ``first / 2 * (1 + cos(pi * step / steps))``, and 0 from ``steps`` on; the authors end at
    three quarters of the training.

    Raises:
        EditError: a share outside of 0 to 1, or no steps.

    Example:
        >>> [round(drop_fraction(step, steps=100), 3) for step in (0, 50, 99, 100)]
        [0.3, 0.15, 0.0, 0.0]

    Evci et al. 2020 (RigL).
    """
    _check_schedule("drop_fraction", steps, first=first)
    return 0.0 if step >= steps else first / 2 * (1 + cos(pi * max(0, step) / steps))


def _check_schedule(place: str, steps: int, **shares: float) -> None:
    if steps < 1 or not all(0 <= share <= 1 for share in shares.values()):
        seen = ", ".join(f"{name}={share}" for name, share in shares.items())
        raise EditError(
            place,
            seen=f"steps={steps}, {seen}",
            needed="at least one step, and shares from 0 to 1",
            next_step="use steps=1000 and a share such as 0.8",
        )


def without_lowest(scores: Sequence[Tensor], count: int) -> list[Tensor]:
    """Masks that shut out the ``count`` lowest entries of all tensors together.

    Of equal entries the earlier ones go first, so that the count is exact.

    Example:
        >>> without_lowest([torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])], 2)
        [tensor([ True, False]), tensor([False,  True])]
    """
    flat = torch.cat([score.flatten() for score in scores])
    kept = torch.ones_like(flat, dtype=torch.bool)
    if count:
        threshold = _threshold(flat, count)
        kept = flat > threshold
        ties = torch.nonzero(flat == threshold).flatten()
        left = count - int((flat < threshold).sum())
        kept[ties[left:]] = True
    parts = kept.split([score.numel() for score in scores])
    return [part.view(score.shape) for part, score in zip(parts, scores, strict=True)]


def _threshold(flat: Tensor, count: int) -> Tensor:
    """The ``count``-th lowest entry; of many, the candidates are bracketed by a sample first."""
    if flat.numel() > _MANY:
        sample = flat[:: flat.numel() // _SAMPLE].sort().values
        at, margin = count * len(sample) // flat.numel(), len(sample) // 64
        low, high = sample[max(0, at - margin)], sample[min(len(sample) - 1, at + margin)]
        below = int((flat < low).sum())
        near = flat[(flat >= low) & (flat <= high)]
        if below < count <= below + near.numel():
            return near.kthvalue(count - below).values
    return flat.kthvalue(count).values


def keep_n_of_m(score: Tensor, dim: int, n: int, m: int) -> Tensor:
    """A mask that keeps the ``n`` highest of every ``m`` consecutive entries of a dimension.

    Example:
        >>> keep_n_of_m(torch.tensor([[4.0, 3.0, 2.0, 1.0, 5.0, 6.0, 8.0, 7.0]]), 1, 2, 4).int()
        tensor([[1, 1, 0, 0, 0, 0, 1, 1]], dtype=torch.int32)
    """
    moved = score.movedim(dim, -1)
    groups = moved.reshape(*moved.shape[:-1], -1, m)
    best = groups.topk(n, dim=-1).indices
    mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, best, True)
    return mask.reshape(moved.shape).movedim(-1, dim)


def lamp(weight: Tensor) -> Tensor:
    """The square of each weight over the sum of all squares in its tensor that are not smaller.

    One threshold over such scores gives every tensor a share of its own; the largest weight of
    each scores 1, so that none is emptied. Shape as ``weight``, float64.

    Example:
        >>> lamp(torch.tensor([1.0, -2.0, 2.0])).tolist()
        [0.1111111111111111, 0.5, 1.0]

    Lee et al. 2021 (LAMP).
    """
    sizes, order = weight.detach().abs().flatten().sort()
    squares = sizes.double().square()
    sums = squares.flip(0).cumsum(0).flip(0)
    scores = torch.where(sums > 0, squares / sums, 0.0)
    return torch.empty_like(scores).index_copy_(0, order, scores).view(weight.shape)
