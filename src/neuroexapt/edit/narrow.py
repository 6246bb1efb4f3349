"""Narrow: structured pruning of a width by a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import lcm
from numbers import Integral, Real

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
from neuroexapt.edit.compensate import Given, compensate
from neuroexapt.edit.importance import SCORES, unit_norms
from neuroexapt.edit.patch import DimEdit, Drawing, Patch, Rewrite, WidthStep, query_scalings
from neuroexapt.errors import EditError


@dataclass(frozen=True)
class Narrow(Edit):
    """Remove the least important units of a width from every tensor that has it.

    Promise: approximate; exact when the removed units are dead and no norm mixes over the width.
    A narrower attention head keeps the scale of its logits. The order of the units that stay is
    kept.

    Args:
        at: module path (its output width), a width's name, or a glob over both. With a glob
            a width of one unit stays as it is, and one that has the minimum already.
        to: the new size.
        by: number of units to remove (int) or fraction of the present size (float); exactly
            one of ``to`` and ``by``.
        scores: per width name one score a unit, higher is more important; see
            :func:`neuroexapt.measure.unit_scores` for scores from data.
        score: how the widths without ``scores`` are ranked: ``"l2"`` or ``"l1"`` norm of all
            coupled weights, or ``"random"``.
        seed: of the random score.
        multiple_of: the new size is rounded up to a multiple of this (hardware likes 8 or 64),
            unless ``to`` was given for a single width, which must be one already.
        minimum: no width gets fewer units than this.
        means: what readers are given on average, from :func:`neuroexapt.measure.reader_inputs`:
            the removed units' mean goes into the biases (or running means) behind their readers.
        products: from the same function: readers are fitted anew by least squares.
        ridge: how strongly that fit is held to the old weights, beside the mean square of an input.

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

    Fang et al. 2023 (DepGraph) for the group norm over coupled tensors; He et al. 2017 for least
    squares.
    """

    at: str
    to: int | None = None
    by: int | float | None = None
    scores: Mapping[str, Sequence[float]] = field(default_factory=dict, hash=False)
    score: str = "l2"
    seed: int = 0
    multiple_of: int = 1
    minimum: int = 1
    means: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    products: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)
    ridge: float = 1e-3

    @property
    def place(self) -> str:
        return self.at

    def check(self, axes: AxisMap) -> list[EditError]:
        """Place, sizes, and scores that do not fit their width."""
        problems = one_of_to_and_by(self.at, self.to, self.by)
        widths, missing = found_widths(axes, self.at)
        problems += missing
        problems += [_no_width(name) for name in self.scores if name not in axes.widths]
        problems += self._bad_settings(axes)
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
                scores = unit_norms(axes, width, tensors, self.score, self.seed)
            step = _step(drawing, drawing.width(width.name), best(scores, size))
            drawing.record(step)
            steps.append(step)
        if not steps:
            raise EditError(
                self.at,
                seen="only widths that are no larger than what must stay",
                needed=f"a width of more than {max(1, self.minimum)} units, in multiples of "
                f"{self.multiple_of}",
                next_step="name another width (see `map_axes(...).widths`), or lower `minimum` and "
                "`multiple_of`",
            )
        sizes = ", ".join(f"{s.width} to {len(s.positions)}" for s in steps)
        rewrites, told = tuple[Rewrite, ...](), ""
        if self.means:
            given = Given(self.means, self.products, self.ridge)
            rewrites, told = compensate(axes, tensors, steps, given)
        return Patch(
            self,
            "approximate",
            f"narrow {sizes}" + (f"; {told}" if told else ""),
            tuple(steps),
            attributes=drawing.attributes(axes),
            rewrites=rewrites,
        )

    def _new_size(self, width: Width) -> int:
        """The size it gets; its present one where a glob leaves it alone."""
        several, unit = is_glob(self.at), lcm(width.multiple, int(self.multiple_of))
        size, least = self.to, max(width.least, int(self.minimum))
        if size is None:
            size = width.size - units_of(self.at, self.by, width.size)
        if (several and self.to is None) or isinstance(self.by, float) or self._rounds(several):
            size, least = (-(-number // unit) * unit for number in (size, least))
        if several and (self.to is None or size >= 1):
            size = max(size, least)
            if size >= width.size:
                return width.size
        if not least <= size < width.size:
            raise EditError(
                self.at,
                seen=f"to={self.to}" if self.to is not None else f"by={self.by} leaving {size}",
                needed=f"at least {least} and fewer than the present size of '{width.name}', "
                f"{width.size}",
                next_step=_another_size(width, least),
            )
        if size % width.multiple:
            raise not_a_multiple(width, size)
        if size % unit:
            raise _uneven(self, width, size, unit)
        return size

    def _rounds(self, several: bool) -> bool:
        return self.multiple_of > 1 and (several or self.to is None)

    def _bad_settings(self, axes: AxisMap) -> list[EditError]:
        names = f"one of {', '.join(SCORES)}"
        wrong = [] if self.score in SCORES else [_wrong("score", self.score, names, SCORES[0])]
        for name in ("multiple_of", "minimum"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                wrong.append(_wrong(name, value, "a whole number of at least 1", 1))
        if not isinstance(self.ridge, Real) or not 0 < self.ridge < float("inf"):
            wrong.append(_wrong("ridge", self.ridge, "a positive number", 1e-3))
        strange = [name for name in (*self.means, *self.products) if name not in axes.tensors]
        lone = [name for name in self.products if name not in self.means]
        for name in dict.fromkeys((*strange, *lone)):
            seen = "means or products for" if name in strange else "products without means for"
            wrong.append(
                EditError(
                    name,
                    seen=f"{seen} '{name}'",
                    needed="both by the names of this model's weights",
                    next_step="take them from `neuroexapt.measure.reader_inputs` on this model",
                )
            )
        return wrong

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


def _wrong(name: str, value: object, needed: str, example: object) -> EditError:
    return EditError(
        name, seen=f"{name}={value!r}", needed=needed, next_step=f"use {name}={example!r}"
    )


def _another_size(width: Width, least: int) -> str:
    half = max(least, width.size // 2)
    if half < width.size:
        return f"use to={half}, or remove the whole layer"
    return "lower `minimum` and `multiple_of`, or remove the whole layer"


def _uneven(edit: Narrow, width: Width, size: int, unit: int) -> EditError:
    low = size // unit * unit
    return EditError(
        width.name,
        seen=f"a size of {size}",
        needed=f"a multiple of {unit} (multiple_of={edit.multiple_of})",
        next_step=f"use to={low or unit}, or give `by`, which is rounded",
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
