"""Second moments of new entries: the mean of their siblings', or what was measured of them.

An optimizer divides by the root of a running mean of squared gradients. What it starts from beside
an old step count sets the length of a new unit's first steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from neuroexapt.capture.run import named_tensors
from neuroexapt.edit import Patch, resized
from neuroexapt.errors import GuardError
from neuroexapt.guard.ledger import Ledger
from neuroexapt.guard.optimizer import POWERS, SECOND_MOMENTS, convert

SquaredGradients = Callable[[nn.Module], Mapping[str, Tensor]]
SecondMoments = Literal["siblings"] | SquaredGradients

# Three times the siblings' step for the same gradient. Behind readers of zero a new unit has hardly
# any gradient yet; divided by its root, the first that comes would make it leap.
_LEAST = 1 / 9


def check_policy(policy: SecondMoments) -> None:
    """Refuse what is no policy.

    Raises:
        GuardError: neither ``"siblings"`` nor something that measures.
    """
    if policy != "siblings" and not callable(policy):
        raise GuardError(
            "second_moments",
            seen=repr(policy),
            needed="'siblings', or a function from a model to squared gradients",
            next_step="pass neuroexapt.measure.Probe(loss_fn, batches)",
        )


def new_entries(model: nn.Module, patch: Patch) -> dict[str, Tensor]:
    """For each parameter that a patch resizes, true where it will have entries of its own.

    To be asked before the patch is written. A copy of an old unit has that unit's moments.
    """
    named = named_tensors(model)
    marks = {}
    for name in patch.tensors:
        if isinstance(named[name], nn.Parameter):
            ones, unused = torch.ones(named[name].shape), torch.Generator()
            marks[name] = resized(ones, patch.steps, name, generator=unused, fill="zero") == 0
    return {name: mark for name, mark in marks.items() if mark.any()}


def seed_moments(
    ledger: Ledger,
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    entries: Mapping[str, Tensor],
    squares: Mapping[str, Tensor],
) -> None:
    """Scale second moments of new entries by their measured share of their siblings'.

    They hold the mean of their siblings'. Both are measured on the same batches, so what an
    optimizer makes of squared gradients (sums, maxima, means without their bias taken off) does not
    matter, nor does the size of a batch. One factor for all entries of a new unit in a tensor; at
    least a ninth, and one where no gradient reaches it.

    Args:
        entries: where the entries are new, by :func:`new_entries`.
        squares: squared gradients by parameter name.

    Raises:
        GuardError: one is missing, of another shape, or not finite.
    """
    for name, new in entries.items():
        parameter = named_tensors(model)[name]
        found = squares.get(name)
        if not parameter.requires_grad:
            continue
        if found is None or found.shape != new.shape or not found.isfinite().all():
            seen = "none" if found is None else f"shape {tuple(found.shape)}, or not finite"
            raise GuardError(
                name,
                seen=f"squared gradients: {seen}",
                needed=f"finite ones of shape {tuple(new.shape)}",
                next_step="measure them on the edited model, on batches like those of training",
            )
        change = partial(_seeded, factors=_factors(found, new.to(found.device)))
        convert(ledger, optimizer, parameter, change, name, factored=True)


def _factors(squares: Tensor, new: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """For each dimension, which slices are new throughout, and their share of the old entries'."""
    siblings = squares[~new].double().mean()
    found = []
    for dim in range(squares.dim()) if siblings > 0 else ():
        fresh = _slices(new, dim).all(1)
        share = _slices(squares.double(), dim).mean(1)[fresh] / siblings
        found.append((dim, fresh, torch.where(share > 0, share.clamp(min=_LEAST), 1.0)))
    return found


def _slices(tensor: Tensor, dim: int) -> Tensor:
    return tensor.movedim(dim, 0).reshape(tensor.shape[dim], -1)


def _seeded(key: str, value: Tensor, factors: list[tuple[int, Tensor, Tensor]]) -> Tensor:
    scale = torch.ones_like(value)
    for dim, fresh, share in factors if key in SECOND_MOMENTS else ():
        if value.shape[dim] == len(fresh):  # a factored moment has one entry along the other
            column = share.to(value) ** (POWERS.get(key, 1) / 2)
            scale.movedim(dim, 0)[fresh] = column.view(-1, *[1] * (value.dim() - 1))
    return value * scale
