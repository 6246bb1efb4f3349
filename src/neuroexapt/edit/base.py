"""The contract of every edit."""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real

from torch import Tensor

from neuroexapt.couple import AxisMap, Width
from neuroexapt.edit.patch import Patch
from neuroexapt.errors import EditError


@dataclass(frozen=True)
class Edit(abc.ABC):
    """A change of architecture as a value.

    Laws every edit obeys (``tests/laws``): :meth:`check` and :meth:`plan` write nothing; what
    :meth:`plan` promises in ``Patch.preserves`` is verified when it is applied; an edit that
    cannot be made raises before anything is written.
    """

    @abc.abstractmethod
    def check(self, axes: AxisMap) -> list[EditError]:
        """All that stands against this edit on this model; empty when it can be made."""

    @abc.abstractmethod
    def plan(self, axes: AxisMap, tensors: Mapping[str, Tensor]) -> Patch:
        """Decide what to change. ``tensors`` are read (for scores), never written.

        Raises:
            EditError: the first problem :meth:`check` finds.
        """

    @property
    @abc.abstractmethod
    def place(self) -> str:
        """Where it applies, as the user wrote it."""


def is_glob(at: str) -> bool:
    """Whether a place may mean several widths."""
    return isinstance(at, str) and any(sign in at for sign in "*?[")


def found_widths(axes: AxisMap, at: str) -> tuple[tuple[Width, ...], list[EditError]]:
    """The widths a place means, or the error that says why it means none."""
    try:
        if is_glob(at):
            return axes.find(at), []
        return (axes.one(at),), []
    except EditError as error:
        return (), [error]


def not_a_multiple(width: Width, size: int) -> EditError:
    """A size that a kernel over the width cannot take."""
    low = size // width.multiple * width.multiple
    return EditError(
        width.name,
        seen=f"a size of {size}",
        needed=f"a multiple of {width.multiple}, which a kernel over this width demands",
        next_step=f"use to={low or width.multiple} or to={low + width.multiple}",
    )


def units_of(place: str, amount: int | float | None, size: int) -> int:
    """A number of units from a count or a fraction of the size; at least one.

    Raises:
        EditError: not positive, or a fraction that is no number.

    Example:
        >>> units_of("fc1", 0.25, 10), units_of("fc1", 3, 10)
        (2, 3)
    """
    number = 0 if amount is None or isinstance(amount, (bool, str)) else amount
    if not isinstance(number, Real) or not 0 < number < float("inf"):
        raise EditError(
            place,
            seen=f"by={amount!r}",
            needed="a positive number of units (int) or a positive fraction (float)",
            next_step="use by=8 for eight units or by=0.25 for a quarter",
        )
    # numpy numbers count as well: sizes are often the outcome of a calculation.
    return int(number) if isinstance(number, Integral) else max(1, int(number * size + 1e-9))


def one_of_to_and_by(place: str, to: int | None, by: int | float | None) -> list[EditError]:
    """An error unless exactly one of both is given, and ``to`` is a whole number."""
    if (to is None) != (by is None):
        if to is None or (isinstance(to, Integral) and not isinstance(to, bool)):
            return []
        return [
            EditError(
                place,
                seen=f"to={to!r}",
                needed="a whole number of units",
                next_step="use to=8, or by=0.5 for a fraction of the present size",
            )
        ]
    return [
        EditError(
            place,
            seen=f"to={to!r}, by={by!r}",
            needed="exactly one of `to` (the new size) and `by` (the change)",
            next_step="give one of them",
        )
    ]
