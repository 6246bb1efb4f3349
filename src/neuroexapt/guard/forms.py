"""Forms of tensors: shape, dtype and the way they lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """What a tensor is to be; ``strides`` where they are not those of its shape."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...] | None = None


def strides(form: Form) -> tuple[int, ...]:
    """The strides of a form."""
    if form.strides is not None:
        return form.strides
    found, step = [], 1
    for size in reversed(form.shape):
        found.append(step)
        step *= max(size, 1)
    return tuple(reversed(found))


def empty(form: Form, device: torch.device) -> Tensor:
    """A tensor of a form, without values."""
    return torch.empty_strided(form.shape, strides(form), dtype=form.dtype, device=device)


def form_of(tensor: Tensor) -> Form:
    """The form of a tensor; what shares or skips memory is taken as if it did not.

    Which kernels an operator takes, and so its last bits, may depend on strides.

    Example:
        >>> form_of(torch.ones(2, 3).T).strides, form_of(torch.ones(2, 3)).strides
        ((1, 3), None)
    """
    plain = Form(tuple(tensor.shape), tensor.dtype)
    held = tuple(tensor.stride())
    if held == strides(plain) or not is_dense(plain.shape, held):
        return plain
    return Form(plain.shape, plain.dtype, held)


def is_dense(shape: Sequence[int], held: Sequence[int]) -> bool:
    """Whether strides lay a shape out in memory without gap or overlap.

    Example:
        >>> is_dense((2, 3), (1, 2)), is_dense((2, 3), (0, 1)), is_dense((2, 3), (6, 1))
        (True, False, False)
    """
    if len(shape) != len(held) or not all(shape):
        return False
    step = 1
    for stride, size in sorted((st, si) for st, si in zip(held, shape, strict=True) if si > 1):
        if stride != step:
            return False
        step *= size
    return all(0 < st <= step for st in held)
