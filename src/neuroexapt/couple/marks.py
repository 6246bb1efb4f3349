"""What rules say: where a tensor's axes stem from, and what parameters do in a call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from neuroexapt.couple.axis import Axis

Dims: TypeAlias = tuple[Axis, ...]


@dataclass(frozen=True)
class Pick:
    """Only positions start..stop of an axis go on (the query part of a fused qkv, say)."""

    axis: Axis
    start: int
    stop: int


@dataclass(frozen=True)
class Join:
    """The positions become a segment of a longer axis, from ``start`` on (``size`` of them)."""

    axis: Axis
    start: int
    size: int


@dataclass(frozen=True)
class Label:
    """One dimension of one parameter from which a tensor dimension was made.

    ``steps`` say what became of its positions on the way, in order. ``muted``: zeros in the
    parameter are no zeros here any more.
    """

    name: str
    dim: int
    steps: tuple[Pick | Join, ...] = ()
    muted: bool = False

    def then(self, step: Pick | Join) -> Label:
        """The label after one more step."""
        return replace(self, steps=(*self.steps, step))

    def mute(self) -> Label:
        """The label where zeros in the parameter do not show as zeros."""
        return replace(self, muted=True)


Labels = tuple[frozenset[Label], ...]


# How the mean of the siblings fares: kept, kept where a norm's scale is even, or lost.
KEPT, POSTED, LOST = 0, 1, 2


@dataclass(frozen=True)
class Entry:
    """What new entries along one dimension of a tensor have become.

    Attributes:
        mean: whether entries made as the mean of their siblings are still their mean.
        zero: whether entries made zero are still zero.
        taken: whether a layer norm has taken their mean off: whatever mean they were made as,
            they are the norm's shift here.
    """

    mean: int = KEPT
    zero: bool = True
    taken: bool = False


def joined(states: Iterable[Entry]) -> Entry:
    """What is left where several tensors are added up."""
    found = list(states)
    return Entry(
        max((state.mean for state in found), default=KEPT),
        all(state.zero for state in found),
        bool(found) and all(state.taken for state in found),
    )


@dataclass(frozen=True)
class Mark:
    """A role that a parameter dimension plays in a call.

    ``role`` is ``"producer"``, ``"consumer"`` or ``"elementwise"``; ``fill`` says what a new
    entry of an elementwise tensor holds: ``"zero"``, ``"one"`` or ``"mean"`` of its siblings.
    ``reads`` are the parameter dimensions from which what a consumer reads was made, ``entry``
    is what new entries have become where it reads them.
    """

    label: Label
    axis: Axis
    role: str
    fill: str
    reads: frozenset[Label] = frozenset()
    entry: Entry = Entry()


@dataclass(frozen=True)
class Mix:
    """An operator that mixes over an axis, so that its size or a new entry changes others.

    ``makers`` are the parameter dimensions that the mixed tensor's axis stems from, ``entry`` is
    what new entries have become when they are mixed.
    ``data`` holds what a mutation needs to keep the function (names of the norm's weight and
    bias, the labels of both sides of a dot product).
    """

    axis: Axis
    kind: str
    module: str
    place: str
    data: Mapping[str, Any]
    makers: frozenset[Label] = frozenset()
    entry: Entry = field(default_factory=Entry)


@dataclass(frozen=True)
class Bind:
    """A module attribute that repeats the sizes of these axes (one: an int; more: a tuple)."""

    module: str
    attribute: str
    axes: Dims
    is_tuple: bool = False
