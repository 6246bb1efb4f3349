"""Narrow: structured pruning of a width by a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from neuroexapt.couple import AxisMap, Width
from neuroexapt.edit.base import (
    Edit,
    found_widths,
    is_glob,
    not_a_multiple,
    one_of_to_and_by,
    units_of,
)
from neuroexapt.edit.patch import DimEdit, Drawing, Patch, WidthStep, query_scalings
from neuroexapt.edit.resize import unit_sums
from neuroexapt.errors import EditError


@dataclass(frozen=True)
class Narrow(Edit):
    """Remove the least important units of a width from every tensor that has it.

    Promise: approximate; exact when the removed units are dead and no norm mixes over the width.
    A narrower attention head keeps the scale of its logits. The order of the units that stay is
    kept.

    Args:
        at: module path (its output width), a width's name, or a glob over both. With a glob
            a width of one unit stays as it is.
        to: the new size.
        by: number of units to remove (int) or fraction of the present size (float); exactly
            one of ``to`` and ``by``.
        scores: per width name one score a unit, higher is more important. Widths without
            scores are ranked by the group norm of all coupled weights.

    Raises:
        UnknownPlaceError, PinnedError, EditError: from :meth:`plan`.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from neuroexapt import Narrow, apply
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> done = apply(net, Narrow("0", to=6), args=(torch.randn(5, 4),))
        >>> net[0].weight.shape, net[2].weight.shape, done.parameters_after
        (torch.Size([6, 4]), torch.Size([2, 6]), 44)

    Fang et al. 2023 (DepGraph) for the group norm over coupled tensors.
    """

    at: str
    to: int | None = None
    by: int | float | None = None
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict, hash=False)

    @property
    def place(self) -> str:
        return self.at

    def check(self, axes: AxisMap) -> list[EditError]:
        """Place, sizes, and scores that do not fit their width."""
        problems = one_of_to_and_by(self.at, self.to, self.by)
        widths, missing = found_widths(axes, self.at)
        problems += missing
        problems += [_no_width(name) for name in self.scores if name not in axes.widths]
        for width in widths if not problems else ():
            try:
                self._new_size(width)
                self._check_scores(width)
            except EditError as error:
                problems.append(error)
        return problems

    def plan(self, axes: AxisMap, tensors: Mapping[str, Tensor]) -> Patch:
        """Keep the best units, in their order."""
        problems = self.check(axes)
        if problems:
            raise problems[0]
        drawing, steps = Drawing(axes), []
        for width in found_widths(axes, self.at)[0]:
            size = self._new_size(width)
            if size == width.size:
                continue
            scores = self.scores.get(width.name)
            if scores is None:
                scores = group_norm(axes, width, tensors)
            step = _step(drawing, drawing.width(width.name), best(scores, size))
            drawing.record(step)
            steps.append(step)
        if not steps:
            raise EditError(
                self.at,
                seen="only widths of one unit",
                needed="a width of two or more",
                next_step="name another width; see `map_axes(...).widths`",
            )
        sizes = ", ".join(f"{s.width} to {len(s.positions)}" for s in steps)
        return Patch(
            self,
            "approximate",
            f"narrow {sizes}",
            tuple(steps),
            attributes=drawing.attributes(axes),
        )

    def _new_size(self, width: Width) -> int:
        several = is_glob(self.at)
        if self.to is None:
            removed = units_of(self.at, self.by, width.size)
            size = width.size - removed
            if several or isinstance(self.by, float):
                size = -(-size // width.multiple) * width.multiple
            if several:
                return max(1, size)
        else:
            size = self.to
            if several and size >= width.size >= 1 and size >= 1:
                return width.size
        if not 1 <= size < width.size:
            raise EditError(
                self.at,
                seen=f"to={self.to}" if self.to is not None else f"by={self.by} leaving {size}",
                needed=f"at least 1 and fewer than the present size of '{width.name}', "
                f"{width.size}",
                next_step=f"use to={max(1, width.size // 2)}, or remove the whole layer",
            )
        if size % width.multiple:
            raise not_a_multiple(width, size)
        return size

    def _check_scores(self, width: Width) -> None:
        scores = self.scores.get(width.name)
        if scores is None:
            return
        values = _array(scores)
        if values.shape != (width.size,) or not np.isfinite(values).all():
            raise EditError(
                width.name,
                seen=f"{len(values)} scores, finite: {bool(np.isfinite(values).all())}",
                needed=f"{width.size} finite scores, one a unit",
                next_step="pass one number for each unit of the width",
            )


def _no_width(name: str) -> EditError:
    return EditError(
        name,
        seen="scores for a name that is no width of this model",
        needed="names of widths, such as 'features.0.out'",
        next_step="take the names from `map_axes(...).widths`",
    )


def _array(scores: Sequence[float] | Tensor) -> NDArray[np.float64]:
    values: NDArray[np.float64] = torch.as_tensor(scores, dtype=torch.float64).cpu().numpy()
    return values


def best(scores: Sequence[float], size: int) -> tuple[int, ...]:
    """Positions of the ``size`` highest scores in ascending order; ties go to the first.

    Example:
        >>> best([0.3, 0.1, 0.3, 0.9], 2)
        (0, 3)
    """
    order = np.argsort(-_array(scores), kind="stable")
    return tuple(sorted(int(unit) for unit in order[:size]))


def _step(drawing: Drawing, width: Width, positions: tuple[int, ...]) -> WidthStep:
    dims = tuple(
        DimEdit(place.tensor, place.dim, drawing.expr(place.tensor, place.dim), "zero")
        for place in width.appearances
    )
    return WidthStep(width.name, positions, dims, query_scalings(width, len(positions)))


def group_norm(axes: AxisMap, width: Width, tensors: Mapping[str, Tensor]) -> list[float]:
    """Root of the squared weights of each unit over all tensors that make or read it.

    Each tensor's share is divided by its mean over units, so that no tensor rules by its size.
    """
    total = torch.zeros(width.size, dtype=torch.float64)
    for place in width.appearances:
        if place.roles == {"elementwise"}:
            continue
        squares = tensors[place.tensor].detach().abs().double().square().cpu()
        expr = axes.tensors[place.tensor][place.dim]
        share = unit_sums(squares, expr, width.name, place.dim, width.size)
        mean = float(share.mean())
        if mean > 0:
            total += share / mean
    return [float(value) for value in total.sqrt()]
